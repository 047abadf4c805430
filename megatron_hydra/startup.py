"""What the time from a command to its first step is made of."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import psutil

_running: list[StartupClock] = []

_is_new_process = False


def process_is_one_run() -> None:
    """The next :class:`StartupClock` counts from this process's start on, imports included.

    Without it a clock counts from its own making: a process that did other things before (a worker of an
    experiment, a test) would count those as its imports.
    """
    global _is_new_process
    _is_new_process = True


class StartupClock:
    """Seconds of a run by part of its start, from the launcher's first moment on.

    Parts are measured by :func:`startup_phase` wherever they happen; a part inside another counts for
    itself alone. What no part covers is ``other``.
    """

    def __init__(self) -> None:
        global _is_new_process
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = self._began = time.time()
        if not _is_new_process:
            return
        _is_new_process = False
        started = psutil.Process().create_time()
        self._began = started
        if "LOCAL_RANK" in os.environ:  # under torchrun, which is this process's parent
            self._began = min(started, psutil.Process(os.getppid()).create_time())
            self._seconds["launcher"] = started - self._began
        self._seconds["imports"] = max(0.0, self._since - started)

    def __enter__(self) -> StartupClock:
        _running.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _running.remove(self)

    def enter(self, name: str) -> None:
        """Begin a part, inside the one that is running or after it."""
        self._count()
        self._open.append(name)

    def leave(self) -> None:
        """End the part that began last."""
        self._count()
        self._open.pop()

    def _count(self) -> None:
        now = time.time()
        name = self._open[-1] if self._open else "other"
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def seconds(self) -> dict[str, float]:
        """Seconds by part so far, in the order in which they began."""
        self._count()
        return {name: round(value, 3) for name, value in self._seconds.items()}

    def total(self) -> float:
        """Seconds since the launcher, without one this process, or in a used process the clock was started."""
        return round(time.time() - self._began, 3)


@contextlib.contextmanager
def startup_phase(name: str) -> Iterator[None]:
    """Measure the block as part of the start, if a start is being measured in this process."""
    clock = _running[-1] if _running else None
    if clock is None:
        yield
        return
    clock.enter(name)
    try:
        yield
    finally:
        clock.leave()


def in_words(seconds: dict[str, float]) -> str:
    """``imports 9.2 s, weights 3.1 s``: the parts of a tenth of a second and more, largest first."""
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {value:.1f} s" for name, value in parts if value >= 0.05)
