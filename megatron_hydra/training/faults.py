"""Detect faulty steps, whose update is skipped: the loss or gradient is not finite, or a spike.

All numbers here are the same on all ranks, so all ranks make the same decision. The state is saved in
every checkpoint, so a resumed run makes the same decision too.
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
"""Such a step is skipped: an update would apply only weight decay and old momentum, and the loss of 0 would
make later steps look like spikes."""


class FaultTracker:
    """Classifies steps as good or faulty, and counts the skipped ones.

    Attributes:
        skipped: steps skipped since the run began.
        in_a_row: steps skipped since the last good step.
    """

    def __init__(self, config: FaultsConfig) -> None:
        self._config = config
        self.skipped = self.in_a_row = 0
        window = config.spike_window
        self._losses: collections.deque[float] = collections.deque(maxlen=window)
        self._norms: collections.deque[float] = collections.deque(maxlen=window)

    def judge(self, loss: float, grad_norm: float) -> str:
        """Return the fault of a step, or an empty text for a good step.

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
        """Update the counters and the window of good steps after :meth:`judge`."""
        if fault:
            self.skipped += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            self._losses.append(loss)
            self._norms.append(grad_norm)

    def check_skip_limit(self, step: int, fault: str) -> None:
        """End the run if too many steps in a row were skipped.

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
        """State for the checkpoint, JSON."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "losses": list(self._losses),
            "grad_norms": list(self._norms),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`. A smaller window keeps its newest values."""
        if not state:
            return
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._losses.extend(state["losses"])
        self._norms.extend(state["grad_norms"])
