"""A process that hangs ends itself, and says where it hung."""

from __future__ import annotations

import faulthandler
import sys


class Watchdog:
    """Dumps all threads' stacks and exits if it is not fed in time.

    A dead or hung rank leaves the others inside a collective; each of them then ends by its own
    watchdog, so the whole job is gone within the limit whichever rank was at fault. The timer is C
    code: it fires also while the interpreter waits in a collective.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def feed(self, factor: float = 1.0) -> None:
        """Allow ``factor`` times the limit until the next feeding."""
        faulthandler.dump_traceback_later(self.seconds * factor, exit=True, file=sys.stderr)

    def __enter__(self) -> Watchdog:
        self.feed(5)
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
