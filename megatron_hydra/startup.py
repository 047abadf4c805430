"""The parts of the time from a command to its first step."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import psutil

_running: list[StartupClock] = []

_is_new_process = False


def process_is_one_run() -> None:
    """Let the next :class:`StartupClock` count from this process's start, with imports.

    By default a clock counts from its creation. Otherwise a process with earlier work (a worker of an
    experiment, a test) would count this work as imports.
    """
    global _is_new_process
    _is_new_process = True


class StartupClock:
    """Seconds of a run's start by part, from the launcher's start on.

    :func:`startup_phase` measures parts. A part within another counts separately. Time outside all parts is
    ``other``.
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
        if "LOCAL_RANK" in os.environ:  # the launcher is torchrun, this process's parent
            self._began = min(started, psutil.Process(os.getppid()).create_time())
            self._seconds["launcher"] = started - self._began
        self._seconds["imports"] = max(0.0, self._since - started)

    def __enter__(self) -> StartupClock:
        _running.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _running.remove(self)

    def enter(self, name: str) -> None:
        """Begin a part, within the current one or after it."""
        self._count()
        self._open.append(name)

    def leave(self) -> None:
        """End the current part."""
        self._count()
        self._open.pop()

    def _count(self) -> None:
        now = time.time()
        name = self._open[-1] if self._open else "other"
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def seconds(self) -> dict[str, float]:
        """Seconds by part so far, in the order of their starts."""
        self._count()
        return {name: round(value, 3) for name, value in self._seconds.items()}

    def total(self) -> float:
        """Seconds since the start of the launcher or of this process; in a used process, of the clock."""
        return round(time.time() - self._began, 3)


@contextlib.contextmanager
def startup_phase(name: str) -> Iterator[None]:
    """Measure the block as a part of the start, if this process measures its start."""
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
    """``imports 9.2 s, weights 3.1 s``: parts of at least a tenth of a second, the largest first."""
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {value:.1f} s" for name, value in parts if value >= 0.05)
