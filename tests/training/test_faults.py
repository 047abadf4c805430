"""Faulty steps; a resumed run makes the same decisions as an undisturbed one."""

from __future__ import annotations

import json

import pytest

from megatron_hydra.config.run import FaultsConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.training.faults import NOT_FINITE, FaultTracker

CONFIG = FaultsConfig(max_skipped_steps=2, spike_factor=3, spike_window=4)


def _fed(losses: list[float], config: FaultsConfig = CONFIG) -> tuple[FaultTracker, list[str]]:
    keeper, faults = FaultTracker(config), []
    for loss in losses:
        faults.append(keeper.judge(loss, 1.0))
        keeper.count(loss, 1.0, faults[-1])
    return keeper, faults


@pytest.mark.parametrize("bad", [(float("nan"), 1.0), (1.0, float("inf")), (float("-inf"), 0.0)])
def test_values_that_are_not_finite_are_faults(bad: tuple[float, float]) -> None:
    assert FaultTracker(FaultsConfig()).judge(*bad) == NOT_FINITE


def test_a_spike_is_far_above_the_median_of_good_steps() -> None:
    keeper, faults = _fed([9.0, 2.0, 2.0, 2.0, 5.9, 6.1, 2.0])
    assert [bool(fault) for fault in faults] == [False] * 5 + [True, False]
    assert "loss 6.1 is more than 3 times the median of the last 4 good steps, 2" in faults[5]
    assert (keeper.skipped, keeper.in_a_row) == (1, 0)
    assert "gradient norm 3.5" in keeper.judge(2.0, 3.5)


def test_nothing_is_a_spike_before_the_window_is_full_or_without_a_factor() -> None:
    assert not any(_fed([1.0, 1.0, 1.0, 100.0])[1])
    assert not any(_fed([1.0] * 9 + [1e9], FaultsConfig())[1])


def test_too_many_in_a_row_end_the_run() -> None:
    keeper, faults = _fed([float("nan")] * 2)
    keeper.check_skip_limit(2, faults[-1])
    keeper.count(0.0, 0.0, NOT_FINITE)
    with pytest.raises(
        HydraError, match=r"step 3: loss or gradient .* 3 steps in a row were skipped"
    ):
        keeper.check_skip_limit(3, NOT_FINITE)


def test_the_state_survives_json() -> None:
    keeper, _ = _fed([1.0, 1.1, 1 / 3, 1.3, float("nan")])
    again = FaultTracker(CONFIG)
    again.restore(json.loads(json.dumps(keeper.state())))
    assert again.state() == keeper.state()
    assert again.judge(4.0, 1.0) == keeper.judge(4.0, 1.0) != ""
    again.restore({})  # a run of a version that did not save this state
    assert again.skipped == 1
