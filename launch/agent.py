"""torchrun, with two things that a preemptible job needs and torchrun lacks.

Stop signals (SIGTERM, SIGUSR1, SIGINT, SIGHUP) are handed to the ranks, which then have all the
time that the scheduler leaves them to save; torchrun would kill them after 30 seconds. And the exit
status of the ranks becomes that of this process, so that a launcher can tell "saved and stopped"
(85) from a failure; torchrun makes a 1 of everything.

    python launch/agent.py --standalone --nproc-per-node 4 -m megatron_hydra.train --config CONFIG

Takes torchrun's options. Under SLURM the node's rank is that of the allocation.
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
    """Hands stop signals to the ranks (the direct children), and remembers that there was one."""

    def __init__(self) -> None:
        self.stopping = False

    def install(self) -> None:
        """Listen from now on; torchrun is told to leave these signals alone."""
        for number in _HANDED_ON:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.stopping = True
        forwarded = _HANDED_ON[signal.Signals(number)]
        if not self._forward_signal(forwarded):
            # The ranks are not there yet (the nodes still look for each other).
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
    """The status that tells what happened to the ranks of this node.

    Args:
        exit_codes: global rank -> exit code of the ranks that did not end with 0, in the order in
            which they were seen to fail; negative: the number of the signal that ended them.
        stopping: whether a stop signal came. A rank that it ends has not begun to listen yet and
            has nothing to save, so that is no failure.

    Returns:
        85 if the run was stopped and can go on, else the status of the first rank that failed
        (128 + n for signal n, as shells have it).
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
    # Imported late: a signal during these seconds would otherwise end this process.
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
