"""Stop signals: noted at once, acted upon by all ranks together at the next step boundary."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

REQUEUE_EXIT_CODE = 85
"""Exit status after a stop by signal: the run is saved and wants to be started again."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_SAME_REQUEST_SECONDS = 3.0
"""A signal to a whole job reaches a rank twice: from the scheduler and through its launcher."""


class StopRequest:
    """Listens for SIGTERM and SIGUSR1.

    The first signal sets :attr:`requested`; whoever runs the loop asks all ranks (one may have got
    the signal alone) and saves. A second signal, seconds later, ends the process at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._requested_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            if time.monotonic() - self._requested_at < _SAME_REQUEST_SECONDS:
                return
            os.write(sys.stderr.fileno(), f"second signal ({name}): leaving at once\n".encode())
            os._exit(128 + number)
        self.requested = True
        self._requested_at = time.monotonic()
        os.write(sys.stderr.fileno(), f"{name}: saving at the next step boundary\n".encode())
