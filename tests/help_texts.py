"""Print the help of commands: ``python tests/help_texts.py < commands``, one JSON list of words a line.

Each runs in a fork of this process, in an empty folder of its own. This process has imported the slow
libraries. The fork has the arguments and the import folders of a separate process.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path


def _run(words: list[str], folder: Path) -> None:
    """Run one command in this fork; never returns."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    (folder / "empty").mkdir()
    os.chdir(folder / "empty")
    status: object = 0
    try:
        if words[0] == "-m":
            sys.path[0] = ""
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(words[0]).parent)
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def main() -> None:
    """One JSON line for each line of standard input."""
    import megatron.core.models.gpt  # noqa: F401
    import transformers  # noqa: F401

    for line in sys.stdin:
        words = json.loads(line)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            pid = os.fork()
            if pid == 0:
                _run(words, folder)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            said = {name: (folder / name).read_text() for name in ("stdout", "stderr")}
            left = [path.name for path in (folder / "empty").iterdir()]
        print(json.dumps({"words": words, "status": status, "left": left, **said}), flush=True)


if __name__ == "__main__":
    import megatron_hydra.parallel.platform  # noqa: F401  (before Megatron-Core)

    main()
