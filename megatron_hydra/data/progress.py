"""Progress of a preparation: share done, tokens/s, time left."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from megatron_hydra.data.corpus import Unit
from megatron_hydra.data.parts import Assembler

Report = Callable[[str], None]
_SECONDS = 2.0


class Progress:
    """Report one line every few seconds.

    Progress is measured in tokens, including those of parts in work, so that it advances during a long unit
    (a shard of a stream may take an hour). The final number of tokens is extrapolated from finished units, and
    is at most ``max_tokens``.
    """

    def __init__(
        self, units: list[Unit], assembler: Assembler, max_tokens: int, report: Report
    ) -> None:
        """Start or resume the reports.

        Args:
            units: units of the preparation.
            assembler: gives the finished work.
            max_tokens: the preparation's limit; 0: no limit.
            report: function that takes the lines.
        """
        self._ends = np.cumsum([unit.size for unit in units])
        self._assembler = assembler
        self._max_tokens = max_tokens
        self._report = report
        self._begin = self._shown = time.monotonic()
        self._first = self._tokens()
        state = assembler.state
        if state.parts:
            report(f"going on after {state.counts.tokens:,} tokens ({state.parts:,} parts)")

    def show(self, last: bool = False) -> None:
        """Report if the interval has passed."""
        now = time.monotonic()
        if now - self._shown < _SECONDS and not last:
            return
        self._shown = now
        tokens, expected = self._tokens(), self._expected()
        rate = (tokens - self._first) / max(now - self._begin, 1e-9)
        share, left = "?", "?"
        if last:
            share, left = "100.0%", _clock(0)
        elif expected:
            share = f"{min(tokens / expected, 1):.1%}"
            left = _clock(max(expected - tokens, 0) / rate) if rate else "?"
        counts = self._assembler.state.counts
        self._report(
            f"{share:>6}  {tokens:,} tokens  {rate:,.0f} tokens/s  "
            f"{counts.documents:,} documents  {counts.bad_rows} bad rows  {left} left"
        )

    def _tokens(self) -> int:
        return self._assembler.state.counts.tokens + self._assembler.tokens_in_work()

    def _expected(self) -> int:
        """Expected final number of tokens; 0 while it is unknown."""
        state = self._assembler.state
        done = int(self._ends[state.parts - 1]) if state.parts else 0
        extrapolated = state.counts.tokens * int(self._ends[-1]) // done if done else 0
        return min((n for n in (extrapolated, self._max_tokens) if n), default=0)


def _clock(seconds: float) -> str:
    """Time as hours:minutes:seconds; hours may exceed 24."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:02}:{minute:02}:{second:02}"
