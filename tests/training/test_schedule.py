"""The learning rate of every step, and what a dry run says of a run."""

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
from megatron_hydra.training.setup import _build_schedule
from tests.training import tiny

LR, MIN_LR, STEPS, WARMUP = 4e-3, 1e-3, 12, 4


def _rates(kind: str) -> list[float]:
    """Learning rate of each step, scheduled as the loop does."""
    config = RunConfig(
        optimizer=OptimizerConfig(lr=LR, min_lr=MIN_LR),
        schedule=ScheduleConfig(kind=kind, steps=STEPS, warmup_steps=WARMUP),
    )
    group = {"max_lr": LR, "min_lr": MIN_LR}
    schedule = _build_schedule(SimpleNamespace(param_groups=[group]), config)
    rates = []
    for _ in range(STEPS):
        schedule.step(1)
        rates.append(group["lr"])
    return rates


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
    """All of it: what each rank would hold stands in comments."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(tiny.run_config(inputs, "distill", str(tmp_path / "run"))))
    arguments = ["--config", str(file), "--dry-run", "--world-size", "2", "parallel.tensor=2"]
    assert train.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "tensor rank 1: FA" in printed
    config = from_dict(RunConfig, yaml.safe_load(printed))
    assert config == load_run_config([file], ["parallel.tensor=2"])
    assert not (tmp_path / "run").exists()
