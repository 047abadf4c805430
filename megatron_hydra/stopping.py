"""Stop requests: recorded at once, handled by all ranks together at the next step boundary.

A request is a SIGTERM or SIGUSR1 to any rank, or a job time limit that is close. Training, selection and
evaluation handle it in the same way: they save once and exit with the same status.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from megatron_hydra.errors import HydraError

REQUEUE_EXIT_CODE = 85
"""Exit status after a stop: the work is saved, and the same command resumes it."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_SAME_REQUEST_SECONDS = 3.0
"""Seconds between two signals that count as one: a signal to a whole job reaches a rank twice, from the
scheduler and through its launcher."""

_listening: list[StopRequest] = []

_helpers: set[int] = set()
"""Process groups that end with this process (:func:`kill_group_on_exit`)."""

_exits_on_stop_signal = False


class Stopped(SystemExit):
    """Raised after a requested stop, when all work is saved; ends the process with status 85."""

    def __init__(self) -> None:
        super().__init__(REQUEUE_EXIT_CODE)


class StopRequest:
    """Listens for SIGTERM and SIGUSR1 while its block runs, and checks the time limit.

    The first signal sets :attr:`requested`. The loop combines this flag over all ranks, because one rank
    alone may have received the signal, and saves. A second signal, seconds later, ends the process at once.

    Args:
        seconds_before_limit: request a stop this many seconds before the end of this process's SLURM
            job (:func:`job_end_time`); 0: wait for a signal of the scheduler.
        ctrl_c: treat SIGINT like the others, unless it is ignored, as in a shell's background job. Otherwise it
            raises KeyboardInterrupt, which Python drops inside a destructor.
    """

    def __init__(self, seconds_before_limit: float = 0, *, ctrl_c: bool = False) -> None:
        listens = ctrl_c and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        self._signals = (*_SIGNALS, signal.SIGINT) if listens else _SIGNALS
        self._signalled = False
        self._requested_at = 0.0
        self._previous: dict[int, object] = {}
        end = job_end_time() if seconds_before_limit > 0 else None
        self._deadline = None if end is None else end - seconds_before_limit

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._signalled or (self._deadline is not None and time.time() >= self._deadline)

    @property
    def reason(self) -> str:
        """Source of the request."""
        return "signal" if self._signalled else "time limit" if self.requested else ""

    def __enter__(self) -> StopRequest:
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._on_signal)
        _listening.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _listening.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._signalled:
            if time.monotonic() - self._requested_at < _SAME_REQUEST_SECONDS:
                return
            os.write(2, f"second signal ({name}): exiting at once\n".encode())
            os._exit(128 + number)
        self._signalled = True
        self._requested_at = time.monotonic()
        if not _exits_on_stop_signal:
            os.write(2, f"{name}: saving at the next boundary\n".encode())


def stop_requested() -> bool:
    """Whether this process listens (inside a :class:`StopRequest` block) and was asked to stop."""
    return any(request.requested for request in _listening)


def exit_if_stopped() -> None:
    """End the process with status 85 if it was asked to stop.

    Call it only where all finished work is on disk and no other rank waits for this one.

    Raises:
        Stopped: a stop was requested.
    """
    if stop_requested():
        print("stopped: the same command resumes from here", file=sys.stderr, flush=True)
        raise Stopped


@contextlib.contextmanager
def exit_on_stop_signal(why: str) -> Iterator[None]:
    """Inside a :class:`StopRequest` block: a signal ends the process at once, with status 85.

    Use it for work that has nothing to save and may take minutes inside compiled code, for example
    compilers or process group initialisation. Python signal handlers do not run there, so a thread
    listens. Process groups given to :func:`kill_group_on_exit` are killed first.

    Args:
        why: reason for the message, for example ``kernels are being compiled``.

    Raises:
        Stopped: the signal arrived before this block.
    """
    global _exits_on_stop_signal
    if any(request.reason == "signal" for request in _listening):
        raise Stopped
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    previous = signal.set_wakeup_fd(writes)
    listener = threading.Thread(target=_exit_on_signal, args=(reads, why), daemon=True)
    _exits_on_stop_signal = True
    listener.start()
    try:
        yield
    finally:
        _exits_on_stop_signal = False
        signal.set_wakeup_fd(previous)
        os.write(writes, b"\0")
        listener.join()
        os.close(reads)
        os.close(writes)


def _exit_on_signal(reads: int, why: str) -> None:
    while (byte := os.read(reads, 1)) != b"\0":
        if not byte or byte[0] not in _SIGNALS:
            continue
        name = signal.Signals(byte[0]).name
        os.write(2, f"{name}: nothing to save yet ({why}): exiting\n".encode())
        for group in _helpers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        os._exit(REQUEUE_EXIT_CODE)


@contextlib.contextmanager
def kill_group_on_exit(group: int) -> Iterator[None]:
    """Kill a process group when the block ends, or when a stop or an error ends this process."""
    _helpers.add(group)
    try:
        yield
    finally:
        _helpers.discard(group)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def job_end_time() -> float | None:
    """End of the time limit of this process's SLURM job, in seconds since the epoch.

    Returns:
        ``SLURM_JOB_END_TIME``, or ``None`` if it is not set.

    Raises:
        HydraError: the variable is set and is not a number.
    """
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise HydraError(
            f"SLURM_JOB_END_TIME is {text!r}: it must be seconds since the epoch; unset it to run "
            "without a time limit"
        ) from None
