"""Steps that must not count: a loss or gradient that is not finite, or far above the usual.

Every number here is the same on all ranks, so all of them come to the same conclusion; the state goes
into every checkpoint, so a resumed run comes to it as well.
"""

from __future__ import annotations

import collections
import math
import statistics
from typing import Any

from megatron_hydra.config.run import FaultsConfig
from megatron_hydra.errors import HydraError

NOT_FINITE = "loss or gradient is not finite"

NOTHING_LEARNED = "no token of the global batch has a loss (all are masked)"
"""An update would be weight decay and old momentum, and a loss of 0 would make later steps spikes."""


class FaultTracker:
    """Judges steps and counts those that were skipped.

    Attributes:
        skipped: steps left out since the run began.
        in_a_row: those since the last good step.
    """

    def __init__(self, config: FaultsConfig) -> None:
        self._config = config
        self.skipped = self.in_a_row = 0
        window = config.spike_window
        self._losses: collections.deque[float] = collections.deque(maxlen=window)
        self._norms: collections.deque[float] = collections.deque(maxlen=window)

    def judge(self, loss: float, grad_norm: float) -> str:
        """What is wrong with a step, or an empty text.

        Args:
            loss: mean over the global batch.
            grad_norm: before clipping, global.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return NOT_FINITE
        for name, value, past in (
            ("loss", loss, self._losses),
            ("gradient norm", grad_norm, self._norms),
        ):
            factor = self._config.spike_factor
            if factor and len(past) == self._config.spike_window:
                usual = statistics.median(past)
                if value > factor * usual:
                    return (
                        f"{name} {value:.6g} is more than {factor:g} times the median of the last "
                        f"{len(past)} good steps, {usual:.6g}"
                    )
        return ""

    def count(self, loss: float, grad_norm: float, fault: str) -> None:
        """Take note of a step that was judged."""
        if fault:
            self.skipped += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            self._losses.append(loss)
            self._norms.append(grad_norm)

    def check_skip_limit(self, step: int, fault: str) -> None:
        """End the run when steps keep being left out.

        Raises:
            HydraError: more than ``faults.max_skipped_steps`` in a row.
        """
        limit = self._config.max_skipped_steps
        if fault and self.in_a_row > limit:
            raise HydraError(
                f"step {step}: {fault}; {self.in_a_row} steps in a row were skipped, "
                f"faults.max_skipped_steps is {limit}; the last checkpoint is good"
            )

    def state(self) -> dict[str, Any]:
        """For the checkpoint, JSON."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "losses": list(self._losses),
            "grad_norms": list(self._norms),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`; a window that has become smaller keeps the newest."""
        if not state:
            return
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._losses.extend(state["losses"])
        self._norms.extend(state["grad_norms"])
