"""A process that hangs ends itself, and says where it hung."""

from __future__ import annotations

import datetime as dt
import faulthandler

PATIENCE = 5
"""What takes longer than a step by its nature (starting, saving) has so many times the limit."""

_watching: list[Watchdog] = []


class Watchdog:
    """Dumps all threads' stacks and exits if it is not fed in time, while its block runs.

    A dead or hung rank leaves the others inside a collective; each of them then ends by its own
    watchdog, so the whole job is gone within the limit whichever rank was at fault. The timer is C
    code: it fires also while the interpreter waits in a collective.

    Args:
        seconds: the limit from one feeding to the next; the first is :data:`PATIENCE` times that.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def feed(self, factor: float = 1.0) -> None:
        """Allow ``factor`` times the limit until the next feeding."""
        # 2: standard error itself, whatever Python's has been replaced by.
        faulthandler.dump_traceback_later(self.seconds * factor, exit=True, file=2)

    def __enter__(self) -> Watchdog:
        self.feed(PATIENCE)
        _watching.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _watching.remove(self)
        faulthandler.cancel_dump_traceback_later()


def feed_watchdog(factor: float = 1.0) -> None:
    """Feed the watchdog whose block runs, if there is one."""
    if _watching:
        _watching[-1].feed(factor)


def collective_timeout(seconds: float | None = None) -> dt.timedelta | None:
    """How long a collective may wait: as long as the watchdog ever does, which has the first word.

    Args:
        seconds: the watchdog's limit; ``None``: of the one whose block runs.

    Returns:
        ``None``, which is torch's default, where no limit is known.
    """
    if seconds is None and _watching:
        seconds = _watching[-1].seconds
    return None if seconds is None else dt.timedelta(seconds=PATIENCE * seconds)
