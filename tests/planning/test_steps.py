"""Predicted steps against measured ones, and the effect of the host's launches; no step runs here."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_hydra.config.run import BackendConfig
from megatron_hydra.planning.hardware import Efficiency, find_gpu
from megatron_hydra.planning.plan import plan_run
from megatron_hydra.planning.timing import Clocks, Machine, elapsed
from tests.parallel.launch import ROOT
from tests.planning.steps import HEADER, STEPS, Step

NAMED = {step.row["name"]: step for step in STEPS}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.row["name"])
def test_a_measured_step_is_met_within_its_factor(step: Step) -> None:
    """A bound wider than a tenth has a reason beside it. Other jobs can only lengthen a measured time."""
    row, predicted = step.row, step.plan.time.total
    assert row["factor"] <= 1.1 or row["why"]
    assert predicted < step.best * 1.1
    assert predicted > step.best / row["factor"]


def test_the_table_of_the_docs_is_this_one() -> None:
    text = (ROOT / "docs/planning.md").read_text()
    lines = [*HEADER, *(step.line() for step in STEPS)]
    assert "\n".join(lines) in text, "python -m tests.planning.steps prints it"


def test_the_torch_twin_is_as_long_as_its_launches() -> None:
    """Without FLA, ``align`` of the 135M model launched 38,000 kernels a step on an H200: mostly host time."""
    step = NAMED["align, 128 × 512"]
    whole = step.model()
    assert whole.full_attention_heads is not None
    some = 3  # only two layers, because all are equal and all would take seconds
    heads = whole.full_attention_heads[-some:]
    model = dataclasses.replace(whole, num_layers=some, full_attention_heads=heads)
    run = dataclasses.replace(step.run(), backend=BackendConfig(gated_delta_net="torch"))
    time = plan_run(model, run, 1, Machine(find_gpu("h200"), Efficiency())).time
    assert time.launches.total * whole.num_layers / some == pytest.approx(38_000, rel=0.15)
    assert time.waiting / time.total > 0.7


def test_free_launches_leave_the_roofline() -> None:
    step = NAMED["distill, HydraHead"]
    free = Efficiency().changed(["launch=0", "triton_launch=0"])
    time = plan_run(step.model(), step.run(), 1, Machine(find_gpu("h200"), free)).time
    assert time.host == pytest.approx(0) and time.waiting == pytest.approx(0)
    assert time.total == pytest.approx(
        sum(time.compute.values()) + sum(time.communication.values()) + time.update
    )
    slow = step.plan.time
    assert slow.total == pytest.approx(time.total + slow.waiting)
    assert slow.launches == time.launches


def test_the_host_runs_ahead_and_is_caught_up_with() -> None:
    clocks = Clocks()
    clocks.run(host=1.0, device=5.0)  # the device starts with the host
    assert clocks.end == 5.0
    clocks.run(host=3.0, device=1.0)  # the host has launched it meanwhile
    assert clocks.end == 6.0
    clocks.run(host=4.0, device=1.0)  # the host is at 8 now, and no longer behind
    assert (clocks.host, clocks.end) == (8.0, 8.0)
    # The host alone, the device alone, and any number of micro-batches.
    assert elapsed([(2.0, 1.0)] * 3, 10) == pytest.approx(60.0)
    assert elapsed([(1.0, 2.0)] * 3, 10) == pytest.approx(60.0)
    mixed = [(2.0, 1.0), (1.0, 3.0)]
    clocks, ends = Clocks(), []
    for _ in range(10):
        for pair in mixed:
            clocks.run(*pair)
        ends.append(clocks.end)
    assert elapsed(mixed, 10) == pytest.approx(ends[-1])
