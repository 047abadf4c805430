"""What the held-out losses of a run say: the best so far, and whether to go on.

Everything follows from the list of losses, which a checkpoint keeps, and from the config; all ranks have
the same, so all of them come to the same conclusion, and so does a resumed run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from megatron_hydra.config.run import ScheduleConfig

ALL_STEPS = "schedule.steps"
"""Why a run has ended that made all its steps."""


@dataclasses.dataclass(frozen=True)
class Standing:
    """How a run stands after its validations.

    Attributes:
        last, best: held-out losses; NaN without a validation (and where a loss was NaN).
        best_step: of the best.
        waited: validations since the last improvement.
    """

    last: float = math.nan
    best: float = math.nan
    best_step: int = 0
    waited: int = 0


def standing(history: Sequence[tuple[int, float]], min_improvement: float) -> Standing:
    """Go through the losses of a run.

    Args:
        history: (step, held-out loss), oldest first; a loss that is not finite never improves.
        min_improvement: a loss has to be lower than that of the last improvement by more than this.
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
    """Why a run is over after ``step`` steps; empty: it is not.

    Args:
        schedule: of the run, as it is now: with more patience, a run that has ended goes on.
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
