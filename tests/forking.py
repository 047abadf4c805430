"""Ranks by fork from a process that has imported everything: a second for all instead of ten for each.

The ranks are processes as any others, with the environment that torchrun gives them. What is missing is
torchrun itself; it is tested where launching is the subject.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

GRACE_SECONDS = 30


def _free_port() -> int:
    """Below the range from which systems take ports for connections, where another process could be given it
    before rank 0 listens; and by process id, so that tests beside each other look in other places.
    """
    for port in range(10_000 + os.getpid() % 20_000, 32_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port from 10,000 to 32,000")


def _rank(rank: int, world: int, port: int, body: Callable[[], object]) -> None:
    """Never returns."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    status: object = 1
    try:
        status = body()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def run_ranks(world: int, body: Callable[[], object]) -> int:
    """Run ``body`` in ``world`` forked ranks to their end.

    As torchrun does, it ends the ranks that are left when one has failed: SIGTERM, and SIGKILL 30
    seconds later.

    Returns:
        0, or the status of the rank that failed first; 128 + the signal's number where one ended it.
    """
    gc.freeze()  # else every collection in a child copies all of the modules' pages
    port = _free_port()
    ranks = set()
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _rank(rank, world, port, body)
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
    return first
