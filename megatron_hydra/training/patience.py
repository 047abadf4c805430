"""Early stopping: find the best held-out loss of a run, and decide whether the run ends.

The decision depends only on the config and on the list of losses, which is saved in every checkpoint.
Both are the same on all ranks and in a resumed run, so the decision is the same too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from megatron_hydra.config.run import ScheduleConfig

ALL_STEPS = "schedule.steps"
"""Reason of a run that ended after all its steps."""


@dataclasses.dataclass(frozen=True)
class Standing:
    """State of early stopping after the validations so far.

    Attributes:
        last, best: held-out losses; NaN without a validation (and where a loss was NaN).
        best_step: step of the best loss.
        waited: validations since the last improvement.
    """

    last: float = math.nan
    best: float = math.nan
    best_step: int = 0
    waited: int = 0


def standing(history: Sequence[tuple[int, float]], min_improvement: float) -> Standing:
    """Compute the state of early stopping from the losses of a run.

    Args:
        history: (step, held-out loss), oldest first; a loss that is not finite never improves.
        min_improvement: a loss is an improvement if it is lower than the last one by more than this.
    """
    now, improved = Standing(), math.inf
    for step, loss in history:
        is_best = math.isfinite(loss) and not loss >= now.best
        is_improvement = math.isfinite(loss) and loss < improved - min_improvement
        if is_improvement:
            improved = loss
        now = Standing(
            loss,
            loss if is_best else now.best,
            step if is_best else now.best_step,
            0 if is_improvement else now.waited + 1,
        )
    return now


def reason_to_end(schedule: ScheduleConfig, step: int, history: Sequence[tuple[int, float]]) -> str:
    """Return why a run ends after ``step`` steps; empty: the run continues.

    Args:
        schedule: the current one; with more patience, a run that has ended continues.
        step: steps done.
        history: as for :func:`standing`.
    """
    if schedule.patience:
        now = standing(history, schedule.min_improvement)
        if now.waited >= schedule.patience:
            best = f"{now.best:.6g} at step {now.best_step}" if now.best_step else "none"
            return (
                f"schedule.patience: {now.waited} validations in a row have not improved the held-out "
                f"loss by more than schedule.min_improvement={schedule.min_improvement:g}; best {best}, "
                f"last {now.last:.6g}"
            )
    return ALL_STEPS if step >= schedule.steps else ""


def history_of(state: dict[str, Any]) -> list[tuple[int, float]]:
    """The losses in a checkpoint's state; JSON has no NaN."""
    return [
        (int(step), math.nan if loss is None else float(loss))
        for step, loss in state.get("history", [])
    ]


def as_json(history: Sequence[tuple[int, float]]) -> list[list[float | None]]:
    """Inverse of :func:`history_of`."""
    return [[step, loss if math.isfinite(loss) else None] for step, loss in history]
