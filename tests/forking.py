"""Fork ranks from a process that has imported everything: one second for all instead of ten for each.

The ranks are ordinary processes with the environment that torchrun gives. Tests of launching use torchrun
itself.
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
    """A free port. It is below the range from which systems take ports for connections: another process could
    get such a port before rank 0 listens. The search starts at a place given by the process id, so that
    concurrent tests look at different ports.
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
    """Run ``body`` in ``world`` forked ranks until they end.

    Like torchrun, it ends the other ranks when one has failed: with SIGTERM, and after 30 seconds with SIGKILL.

    Returns:
        0, or the status of the rank that failed first; 128 + the number of the signal that ended it.
    """
    gc.freeze()  # otherwise every collection in a child copies all pages of the modules
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
