"""A watchdog: a hung process ends itself and prints where it hung."""

from __future__ import annotations

import datetime as dt
import faulthandler

PATIENCE = 5
"""Work that takes longer than a step (starting, saving) has so many times the limit."""

_watching: list[Watchdog] = []


class Watchdog:
    """While its block runs, dumps all threads' stacks and exits if it is not fed in time.

    If a rank is dead or hung, the others wait in a collective. Each of them ends by its own watchdog, so the
    whole job ends within the limit, whichever rank has the fault. The timer is C code: it also fires while the
    interpreter waits in a collective.

    Args:
        seconds: the limit between feedings; the first limit is :data:`PATIENCE` times as long.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def feed(self, factor: float = 1.0) -> None:
        """Allow ``factor`` times the limit until the next feeding."""
        # 2: standard error itself, even if Python's sys.stderr has been replaced.
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
    """The timeout of a collective: the longest limit of the watchdog, which therefore fires first.

    Args:
        seconds: the watchdog's limit; ``None``: that of the active watchdog.

    Returns:
        ``None``, which is torch's default, if there is no limit.
    """
    if seconds is None and _watching:
        seconds = _watching[-1].seconds
    return None if seconds is None else dt.timedelta(seconds=PATIENCE * seconds)
