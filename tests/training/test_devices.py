"""Saving, resuming and training on a GPU: no operator meets tensors of two devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hydra.config import apply_overrides
from megatron_hydra.training.loop import run_training
from tests.training import tiny
from tests.training.pretended_gpu import pretended_gpu


def _run(inputs: Path, output: Path, verb: str, *overrides: str) -> None:
    config = tiny.run_config(inputs, verb, str(output), schedule={"steps": 4, "warmup_steps": 1})
    assert run_training(apply_overrides(config, [f"output={output}", *overrides])) == 0


def test_a_run_saves(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch):
        _run(inputs, tmp_path, "finetune", "checkpoint.interval=2", "backend.streams=one")
