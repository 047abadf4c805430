"""Measurements of a run."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron_hydra.checkpoint import store
from megatron_hydra.config import apply_overrides
from megatron_hydra.parallel.platform import (
    device,
    has_gpu,
    peak_memory_bytes,
    peak_reserved_bytes,
)
from megatron_hydra.reporting import PHASES
from megatron_hydra.training.loop import run_training
from megatron_hydra.training.observe import PhaseTimers
from tests.training import tiny


def test_phases_add_up_and_start_again() -> None:
    timers = PhaseTimers()
    for _ in range(2):
        with timers.phase("save"):
            time.sleep(0.02)
    assert list(timers.over("data", iter([1, 2]))) == [1, 2]
    seconds = dict(zip(PHASES, timers.take(), strict=True))
    assert seconds["save"] >= 0.04
    assert seconds["optimizer"] == 0
    assert timers.take() == [0.0] * len(PHASES)


def test_memory_is_that_of_this_process() -> None:
    before = peak_memory_bytes()
    block = torch.ones(64 * 2**20, dtype=torch.uint8, device=device())
    installed = torch.cuda.mem_get_info()[1] if has_gpu() else psutil.virtual_memory().total
    assert max(before, block.nbytes) <= peak_memory_bytes() <= installed
    assert peak_reserved_bytes() >= peak_memory_bytes() if has_gpu() else peak_reserved_bytes() == 0


@pytest.mark.parametrize("verb", ["align", "distill"])
def test_an_entry_has_all_metrics(verb: str, inputs: Path, tmp_path: Path) -> None:
    config = tiny.run_config(inputs, verb, "unused", logging={"interval": 2, "gamma_interval": 4})
    config = apply_overrides(config, [f"output={tmp_path}", "logging.peak_tflops=0.5"])
    assert run_training(config) == 0
    lines = tiny.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    line = lines[-1]
    parts = {"layers"} if verb == "align" else {"kl", "ce"}
    expected = {"loss", "grad_norm", "lr", "tokens_per_s", "model_tflops", "mfu", "memory_gb"}
    assert expected | parts <= line.keys()
    assert line["mfu"] == pytest.approx(line["model_tflops"] / 0.5, abs=2e-6)  # both are rounded
    assert set(line["seconds"]) == set(PHASES)
    assert line["seconds"]["forward_backward"] > 0
    assert "gamma_fa" not in lines[0]
    _assert_gamma(line, tmp_path)


def _assert_gamma(line: dict, run: Path) -> None:
    """The logged numbers equal those of the checkpoint's weights."""
    weights = store.load_canonical(run / "checkpoints")
    for layer, heads in enumerate(tiny.student_config().full_attention_heads):
        gamma = weights[f"decoder.layers.{layer}.self_attention.gamma"]
        chosen = gamma[list(heads)]
        rest = gamma[[head for head in range(len(gamma)) if head not in heads]]
        for name, values in (("gamma_fa", chosen), ("gamma_gdn", rest)):
            mean = values.double().mean().item() if len(values) else None
            assert line[name][layer] == (mean if mean is None else pytest.approx(mean, rel=1e-6))
