"""The learning rate of every step, and the output of a dry run."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megatron_hydra import train
from megatron_hydra.config import load_run_config
from megatron_hydra.config.loading import from_dict, to_yaml
from megatron_hydra.config.run import OptimizerConfig, RunConfig, ScheduleConfig
from megatron_hydra.data.reading import Reading, SourceRecord, Span
from megatron_hydra.training.setup import build_schedule
from tests.training import tiny

LR, MIN_LR, STEPS, WARMUP = 4e-3, 1e-3, 12, 4


def _rates(kind: str) -> list[float]:
    """The learning rate of each step, scheduled as in the loop."""
    config = RunConfig(
        optimizer=OptimizerConfig(lr=LR, min_lr=MIN_LR),
        schedule=ScheduleConfig(kind=kind, steps=STEPS, warmup_steps=WARMUP),
    )
    group = {"max_lr": LR, "min_lr": MIN_LR}
    schedule = build_schedule(SimpleNamespace(param_groups=[group]), config, _reading([(0, 6)]))
    rates = []
    for _ in range(STEPS):
        schedule.step(1)
        rates.append(group["lr"])
    return rates


def _reading(batches: list[tuple[int, int]]) -> Reading:
    """Learning rates of a run whose global batch changes to these sizes at these steps."""
    spans: list[Span] = []
    for step, size in batches:
        first = spans[-1].first_sample + spans[-1].samples if spans else 0
        end = next((other for other, _ in batches if other > step), step)
        spans.append(
            Span(1, step, first, 0, size, 1, 1, (), steps=end - step, samples=(end - step) * size)
        )
    return Reading((SourceRecord("web", "f"),), tuple(spans))


def _rates_by_samples(kind: str, batches: list[tuple[int, int]], samples: int) -> dict[int, float]:
    """Samples read → learning rate of the step that read the last of them. The run resumes at every change.

    Args:
        batches: pairs (finished steps, global batch from then on).
        samples: number of samples of the whole run. Each batch size sets a new ``schedule.steps``, and within
            the warm-up a new ``warmup_steps``.
    """
    found = {}
    for i in range(len(batches)):
        reading = _reading(batches[: i + 1])
        first, size = batches[i]
        read = reading.samples_before(first)
        steps = first + (samples - read) // size
        left = WARMUP * batches[0][1] - read
        warm = first + left // size if left > 0 else WARMUP
        config = RunConfig(
            optimizer=OptimizerConfig(lr=LR, min_lr=MIN_LR),
            schedule=ScheduleConfig(kind=kind, steps=steps, warmup_steps=warm),
        )
        group = {"max_lr": LR, "min_lr": MIN_LR}
        schedule = build_schedule(SimpleNamespace(param_groups=[group]), config, reading)
        schedule.step(reading.samples_before(first) // reading.batch_unit)
        end = batches[i + 1][0] if i + 1 < len(batches) else steps
        for step in range(first, end):
            schedule.step(size // reading.batch_unit)
            found[reading.samples_before(step + 1)] = group["lr"]
    return found


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_a_changed_batch_keeps_the_learning_rate_per_sample(kind: str) -> None:
    """Batches of 6, then of 12 for the same number of samples; in one case of 6 again."""
    steady = _rates_by_samples(kind, [(0, 6)], STEPS * 6)
    for batches in ([(0, 6), (6, 12)], [(0, 6), (6, 12), (7, 6)], [(0, 6), (2, 12)]):
        changed = _rates_by_samples(kind, batches, STEPS * 6)
        assert max(changed) == STEPS * 6
        assert changed == pytest.approx({n: steady[n] for n in changed}, rel=1e-12)


def test_a_batch_that_never_changes_gives_the_bits_of_a_schedule_in_steps() -> None:
    for size in (1, 6, 7, 1000):
        config = RunConfig(
            optimizer=OptimizerConfig(lr=LR, min_lr=MIN_LR),
            schedule=ScheduleConfig(kind="cosine", steps=STEPS, warmup_steps=WARMUP),
        )
        group = {"max_lr": LR, "min_lr": MIN_LR}
        schedule = build_schedule(
            SimpleNamespace(param_groups=[group]), config, _reading([(0, size)])
        )
        assert (schedule.lr_warmup_steps, schedule.lr_decay_steps) == (WARMUP, STEPS)


def test_a_change_with_the_same_steps_still_ends_at_min_lr() -> None:
    rates = _rates_by_samples("cosine", [(0, 6), (6, 4)], 6 * 6 + 6 * 4)
    assert rates[max(rates)] == pytest.approx(MIN_LR)
    assert max(rates) == 6 * 6 + 6 * 4


def test_cosine_warms_up_and_reaches_min_lr_at_the_last_step() -> None:
    rates = _rates("cosine")
    assert rates[:WARMUP] == pytest.approx([LR * k / WARMUP for k in range(1, WARMUP + 1)])
    done = [k / (STEPS - WARMUP) for k in range(STEPS - WARMUP + 1)]
    expected = [MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * x)) / 2 for x in done]
    assert rates[WARMUP - 1 :] == pytest.approx(expected)
    assert rates[-1] == pytest.approx(MIN_LR)


def test_constant_warms_up_and_stays() -> None:
    rates = _rates("constant")
    assert rates[:WARMUP] == pytest.approx([LR * k / WARMUP for k in range(1, WARMUP + 1)])
    assert rates[WARMUP:] == [LR] * (STEPS - WARMUP)


def test_a_dry_run_prints_a_config_that_can_be_used(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole output: comments describe what each rank would hold."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(tiny.run_config(inputs, "distill", str(tmp_path / "run"))))
    arguments = ["--config", str(file), "--dry-run", "--world-size", "2", "parallel.tensor=2"]
    assert train.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "tensor rank 1: FA" in printed
    config = from_dict(RunConfig, yaml.safe_load(printed))
    assert config == load_run_config([file], ["parallel.tensor=2"])
    assert not (tmp_path / "run").exists()
