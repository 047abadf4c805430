"""Layouts over NCCL in bf16 with FLA's kernels against one GPU: losses, gradient norms, every gradient.

The reference is the same run in fp32 by the torch twins. One GPU in bf16 differs from it by some error; a
layout may not differ much more. So no bound of a gradient depends on a card or a kernel.
"""

from __future__ import annotations

import math

import pytest

from tests.gpu.chain import LAYOUT_STEPS, LAYOUT_VERBS, LAYOUTS
from tests.gpu.needing import needs

GRADIENT_FACTOR, GRADIENT_FLOOR = 2.0, 0.02
"""Bound of a gradient's error: so many times the error of one GPU, plus this share."""
LOSS_BOUND, NORM_BOUND = 2e-3, 2e-2
"""Relative bounds of step 1, whose weights are equal. In the loss, bf16 errors of tokens average out."""
LATER_BOUND = 3e-2
"""Bound of later losses: Adam's first updates are signs, and rounding changes the signs of small gradients."""


def _assert_close(run, note):
    metrics, of_one = run["metrics"], run["metrics_of_one"]
    assert [line["step"] for line in metrics] == list(range(1, LAYOUT_STEPS + 1))
    assert all(math.isfinite(line["loss"]) and not line.get("skipped") for line in metrics)
    losses = [_off(a, b, "loss") for a, b in zip(metrics, of_one, strict=True)]
    norm = _off(metrics[0], of_one[0], "grad_norm")
    excess = {
        name: error / (GRADIENT_FACTOR * run["errors_of_one"][name] + GRADIENT_FLOOR)
        for name, error in run["errors"].items()
    }
    worst = max(excess, key=excess.__getitem__)
    note(
        loss_off=f"{losses[0]:.1e} (later {max(losses[1:]):.1e})", gradient_norm_off=f"{norm:.1e}",
        worst_gradient_off=f"{run['errors'][worst]:.1e} of fp32, one GPU {run['errors_of_one'][worst]:.1e}"
        f" ({worst.rpartition('exp_avg.')[2]})",
    )  # fmt: skip
    assert losses[0] <= LOSS_BOUND
    assert max(losses[1:]) <= LATER_BOUND
    assert norm <= NORM_BOUND
    assert all(math.isfinite(error) for error in run["errors"].values())
    assert excess[worst] <= 1, worst
    assert len(excess) > 20


def _off(line, other, key):
    return abs(line[key] - other[key]) / abs(other[key])


def _of(gpus):
    return [
        (verb, name)
        for name, (count, _) in LAYOUTS.items()
        if count == gpus
        for verb in LAYOUT_VERBS
    ]


@needs("gradients_2")
@pytest.mark.parametrize(("verb", "layout"), _of(2))
def test_two_gpus_train_as_one(verb, layout, result, note):
    _assert_close(result("gradients_2")[f"{verb}-{layout}"], note)


@needs("gradients_4")
@pytest.mark.parametrize(("verb", "layout"), _of(4))
def test_four_gpus_train_as_one(verb, layout, result, note):
    _assert_close(result("gradients_4")[f"{verb}-{layout}"], note)
