"""Early stopping by a run's held-out losses."""

from __future__ import annotations

import json
import math

import pytest

from megatron_hydra.config.run import ScheduleConfig
from megatron_hydra.training.patience import (
    ALL_STEPS,
    Standing,
    as_json,
    history_of,
    reason_to_end,
    standing,
)


def _history(*losses: float) -> list[tuple[int, float]]:
    return [(10 * i, loss) for i, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize(
    ("losses", "least", "expected"),
    [
        ((3.0, 2.0, 2.5, 2.0), 0.0, Standing(2.0, 2.0, 20, 2)),  # an equal loss is no improvement
        ((3.0, 2.9, 2.8), 0.5, Standing(2.8, 2.8, 30, 2)),  # the best is still the lowest
        ((3.0, 2.8, 2.6, 2.4), 0.5, Standing(2.4, 2.4, 40, 0)),  # small steps add up
        ((math.nan, 3.0, math.inf), 0.0, Standing(math.inf, 3.0, 20, 1)),
    ],
)
def test_standing(losses: tuple[float, ...], least: float, expected: Standing) -> None:
    assert standing(_history(*losses), least) == expected


def test_a_loss_that_is_not_finite_never_improves() -> None:
    now = standing(_history(math.nan, math.nan), 0.0)
    assert now.waited == 2
    assert math.isnan(now.best)
    schedule = ScheduleConfig(steps=100, patience=2)
    assert "best none, last nan" in reason_to_end(schedule, 20, _history(math.nan, math.nan))


def test_a_run_ends_by_patience_or_by_its_steps() -> None:
    losses = _history(3.0, 2.0, 2.1, 2.2)
    assert reason_to_end(ScheduleConfig(steps=100), 40, losses) == ""
    assert reason_to_end(ScheduleConfig(steps=100, patience=3), 40, losses) == ""
    said = reason_to_end(ScheduleConfig(steps=100, patience=2), 40, losses)
    assert said.startswith("schedule.patience: 2 validations in a row")
    assert "best 2 at step 20, last 2.2" in said
    assert reason_to_end(ScheduleConfig(steps=40), 40, losses) == ALL_STEPS
    assert reason_to_end(ScheduleConfig(steps=100, patience=2), 0, []) == ""


def test_losses_pass_through_json() -> None:
    losses = _history(3.0, math.nan, 1 / 3)
    back = history_of(json.loads(json.dumps({"history": as_json(losses)}, allow_nan=False)))
    assert back[0] == losses[0]
    assert back[2] == losses[2]
    assert math.isnan(back[1][1])
    assert history_of({}) == []
