"""torchrun with two more features, which preemptible jobs need.

First, stop signals (SIGTERM, SIGUSR1, SIGINT, SIGHUP) are forwarded to the ranks. The ranks can then save until
the scheduler ends the job; torchrun would kill them after 30 seconds. Second, this process exits with the exit
status of the ranks, so that a launcher can distinguish "saved and stopped" (85) from a failure. torchrun would
always exit with 1.

    python launch/agent.py --standalone --nproc-per-node 4 -m megatron_hydra.train --config CONFIG

It accepts torchrun's options. Under SLURM the node's rank is the rank in the allocation.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

import psutil

REQUEUE_STATUS = 85
_HANDED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


class StopForwarder:
    """Forwards stop signals to the ranks (the direct children), and records that a signal came."""

    def __init__(self) -> None:
        self.stopping = False

    def install(self) -> None:
        """Install the handlers, and tell torchrun not to handle these signals."""
        for number in _HANDED_ON:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.stopping = True
        forwarded = _HANDED_ON[signal.Signals(number)]
        if not self._forward_signal(forwarded):
            # The ranks do not exist yet (the nodes are still connecting).
            threading.Thread(
                target=self._forward_signal_later, args=(forwarded,), daemon=True
            ).start()

    def _forward_signal(self, forwarded: signal.Signals) -> bool:
        children = psutil.Process().children()
        for child in children:
            try:
                child.send_signal(forwarded)
            except psutil.NoSuchProcess:
                continue
        return bool(children)

    def _forward_signal_later(self, forwarded: signal.Signals) -> None:
        while not self._forward_signal(forwarded):
            time.sleep(0.2)


def exit_status(exit_codes: dict[int, int], stopping: bool) -> int:
    """Compute this node's exit status from the exit codes of its ranks.

    Args:
        exit_codes: global rank -> exit code, for ranks that did not exit with 0, in the order of failure.
            A negative code is the number of the signal that ended the rank.
        stopping: whether a stop signal came. If the signal ends a rank, this rank has not installed its
            handler yet and has nothing to save, so this is not a failure.

    Returns:
        85 if the run was stopped and can resume, else the status of the first rank that failed (128 + n for
        signal n, as in shells).
    """
    first = next(iter(exit_codes.values()))
    stopped = {-forwarded for forwarded in _HANDED_ON.values()} if stopping else set()
    if first == REQUEUE_STATUS or first in stopped:
        return REQUEUE_STATUS
    return first if first > 0 else 128 - first


def main(arguments: list[str]) -> int:
    """Run torchrun with ``arguments`` in this process and return the ranks' exit status."""
    forwarder = StopForwarder()
    forwarder.install()
    # Imported after the handlers are installed: a signal during these seconds would end this process.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if forwarder.stopping:
        return REQUEUE_STATUS
    if "SLURM_NODEID" in os.environ:
        arguments = ["--node-rank", os.environ["SLURM_NODEID"], *arguments]
    try:
        run.main(["--signals-to-handle", "SIGQUIT", *arguments])
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        status = exit_status(codes, forwarder.stopping)
        if status != REQUEUE_STATUS:
            print(error, file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
