"""Worker: head selection in one process, in three ranks, and killed and resumed; forks of one process.

test_selection.py runs it: ``selection_runs FOLDER ARGUMENT ...``, with the arguments of tools/select_heads.py
except ``--output``. Writes ``FOLDER/{whole,three,killed}/map.json``. ``FOLDER/left.json`` lists the files of
the killed run. The last line printed has the status of every run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from megatron_hydra.selection.work import WorkBench
from tests.forking import run_ranks
from tools import select_heads


def _die_after_receivers() -> None:
    """The run kills itself when the first receivers' effects are on disk; a kill from outside could be late."""
    write = WorkBench._write

    def write_and_die(self: WorkBench, chunk, result) -> None:
        write(self, chunk, result)
        if chunk.key.startswith("receivers"):
            os.kill(os.getpid(), signal.SIGKILL)

    WorkBench._write = write_and_die  # type: ignore[method-assign]


def main(outputs: Path, arguments: list[str]) -> None:
    """Run all selections."""

    def select(name: str, ranks: int = 1, *, killed: bool = False) -> int:
        (outputs / name).mkdir(exist_ok=True)

        def body() -> int:
            if ranks == 1:  # without a launcher
                for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                    del os.environ[variable]
            if killed:
                _die_after_receivers()
            output = str(outputs / name / "map.json")
            sys.argv = ["tools/select_heads.py", *arguments, "--output", output]
            return select_heads.main()

        return run_ranks(ranks, body)

    statuses = {"whole": select("whole"), "three": select("three", 3)}
    statuses["killed"] = select("killed", killed=True)
    left = [path.relative_to(outputs / "killed").as_posix() for path in outputs.glob("killed/**/*")]
    (outputs / "left.json").write_text(json.dumps(left))
    statuses["resumed"] = select("killed")
    print(json.dumps(statuses), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
