"""A launcher for many attempts: it imports everything once and forks the ranks of each (tests/forking.py).

So a machine with two cores can try sixty kills. Some attempts of every test go through torchrun instead.

    python -m tests.faults.forks < requests
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.forking import run_ranks

ROOT = Path(__file__).resolve().parents[2]


class Forker:
    """The parent's side of the launcher: one process for all attempts of a test session."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip

    def run(self, arguments: list[str], environment: dict[str, str], log: Path) -> tuple[int, int]:
        """Run two ranks until they end; returns their session's id and the launcher's status."""
        request = {"arguments": arguments, "environment": environment, "log": str(log)}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        session, status = json.loads(self._process.stdout.readline())
        return session, status

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _worker(request: dict) -> int:
    from tests.faults import worker

    os.environ.update(request["environment"])
    sys.argv = ["worker", *request["arguments"]]
    return worker.main()


def _launch(request: dict) -> None:
    """The launcher of one attempt, in a session of its own. It never returns."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os._exit(run_ranks(2, lambda: _worker(request)))


def main() -> None:
    """Import everything, then fork for each line of standard input."""
    import tests.faults.worker  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _launch(json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([pid, status]), flush=True)


if __name__ == "__main__":
    main()
