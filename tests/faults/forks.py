"""A launcher that starts ranks by fork from a process that has imported everything: a second an
attempt instead of ten, which is what lets a machine with two cores try sixty kills.

    python -m tests.faults.forks < requests

The ranks are processes as any others, joined by gloo over a TCP store; what is missing is torchrun, and
some attempts of every test go through that instead. As torchrun does, the launcher ends the ranks that
are left when one has failed: SIGTERM, and SIGKILL 30 seconds later.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 30


class Forker:
    """The parent's side: one process for all attempts of a test session."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip

    def run(self, arguments: list[str], environment: dict[str, str], log: Path) -> tuple[int, int]:
        """Run two ranks to their end; returns their session's id and the launcher's status."""
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(rank: int, world: int, port: int, request: dict) -> None:
    """Never returns."""
    from tests.faults import worker

    os.environ.update(request["environment"])
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    sys.argv = ["worker", *request["arguments"]]
    status = 1
    try:
        status = worker.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _launch(request: dict, world: int = 2) -> None:
    """The launcher of one attempt, in a session of its own. Never returns."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    port = _free_port()
    ranks = set()
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _rank(rank, world, port, request)
        ranks.add(pid)
    first, killed_at = 0, float("inf")
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ranks.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not first:
                first = code if code > 0 else 128 - code
                killed_at = time.monotonic() + GRACE_SECONDS
                for left in ranks:
                    os.kill(left, signal.SIGTERM)
            continue
        if time.monotonic() > killed_at:
            for left in ranks:
                os.kill(left, signal.SIGKILL)
        time.sleep(0.02)
    os._exit(first)


def main() -> None:
    """Import, then fork for every line of standard input."""
    import tests.faults.worker  # noqa: F401

    gc.freeze()  # else every collection in a child copies all of these modules' pages
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _launch(json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([pid, status]), flush=True)


if __name__ == "__main__":
    main()
