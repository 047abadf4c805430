"""On a GPU, no operator of a run mixes tensors of two devices: training, saving, loading, resuming."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_hydra.config import apply_overrides
from megatron_hydra.conversion.parity import megatron_logits
from megatron_hydra.evaluation.backend import Continuation
from megatron_hydra.evaluation.megatron_backend import layout_config, open_checkpoint
from megatron_hydra.training.checkpoint import first_non_finite
from megatron_hydra.training.loop import run_training
from tests.training import tiny
from tests.training.optimizers import use_optimizer
from tests.training.pretended_gpu import GPU, is_on_gpu, pretended_gpu

SHARDED, WHOLE = "parallel.distributed_optimizer=true", "parallel.distributed_optimizer=false"
AT_ONCE, BEHIND = "checkpoint.asynchronous=false", "checkpoint.asynchronous=true"
CASES = {
    "torch, saved in the background": ("torch", SHARDED, BEHIND, "precision=bf16"),
    "torch, not distributed": ("torch", WHOLE, AT_ONCE, "precision=fp32"),
    "fused, not distributed": ("torch-fused", WHOLE, AT_ONCE, "precision=fp32"),
    "fused": ("torch-fused", SHARDED, AT_ONCE, "precision=fp32"),
    "Apex": ("apex", SHARDED, BEHIND, "precision=bf16"),
    "Apex, not distributed": ("apex", WHOLE, AT_ONCE, "precision=fp32"),
    "Transformer Engine": ("transformer-engine", SHARDED, AT_ONCE, "precision=bf16"),
}
QUICK = ("torch, saved in the background", "fused, not distributed", "Transformer Engine")


def _run(inputs: Path, output: Path, verb: str, *overrides: str) -> None:
    config = tiny.run_config(inputs, verb, str(output), schedule={"steps": 3, "warmup_steps": 1})
    assert run_training(apply_overrides(config, [f"output={output}", *overrides])) == 0


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_a_run_is_saved_and_resumed(
    case: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming is bit for bit, for the state of every optimizer."""
    optimizer, *overrides = CASES[case]
    use_optimizer(optimizer, monkeypatch)
    settings = [*overrides, "checkpoint.interval=2", "checkpoint.keep=0"]
    with pretended_gpu(monkeypatch):
        _run(inputs, tmp_path, "finetune", *settings)
        checkpoints = tmp_path / "checkpoints"
        shutil.move(checkpoints / "step_00000003", tmp_path / "undisturbed")
        (checkpoints / "latest").write_text("step_00000002\n")
        _run(inputs, tmp_path, "finetune", *settings)
    one, other = tiny.everything(tmp_path / "undisturbed"), tiny.everything(checkpoints)
    assert one.keys() == other.keys()
    assert any(key.startswith("optimizer.") for key in one)
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different


@pytest.mark.parametrize("verb", ["align", pytest.param("distill", marks=pytest.mark.slow)])
def test_every_verb_runs_and_saves_without_its_optimizer(
    verb: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_gpu(monkeypatch):
        _run(inputs, tmp_path, verb, "checkpoint.save_optimizer=false")
    assert not any(
        key.startswith("optimizer.") for key in tiny.everything(tmp_path / "checkpoints")
    )


def test_a_checkpoint_is_evaluated(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation gives the same tokens as without a GPU."""

    def answers() -> list[list[int]]:
        run = layout_config(None, [])
        with open_checkpoint(inputs / "student", run) as backend, backend.inference():
            prompts = [
                Continuation([3, 7, 11], max_new_tokens=3),
                Continuation([5], max_new_tokens=2),
            ]
            assert backend.anywhere(True)
            return backend.generate(prompts, [])

    expected = answers()
    with pretended_gpu(monkeypatch):
        assert answers() == expected


def test_a_checkpoint_is_compared_with_its_source(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward that the converters' --verify runs."""
    tokens = torch.arange(20)
    expected = megatron_logits(inputs / "student", tokens)
    with pretended_gpu(monkeypatch):
        assert torch.equal(megatron_logits(inputs / "student", tokens), expected)


def test_finite_is_asked_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch):
        tensors = {
            "weight": torch.ones(3, device=GPU),
            "step": torch.tensor(4.0),
            "moment": torch.ones(2, 2, device=GPU, dtype=torch.bfloat16),
            "none": torch.ones(0, device=GPU),
            "count": torch.ones(2, dtype=torch.int64),
            "scaled": torch.ones(4, device=GPU).to(torch.float8_e4m3fn),
        }
        assert first_non_finite(tensors) == ""
        for name, value in (("step", float("nan")), ("moment", float("-inf"))):
            bad = tensors | {name: torch.full_like(tensors[name], value)}
            assert first_non_finite(bad) == name


# -- the pretended GPU itself ----------------------------------------------------------------------


def test_tensors_of_two_devices_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with CUDA, a number on the host may be an operand element by element, but not elsewhere."""
    with pretended_gpu(monkeypatch):
        there, here, number = torch.ones(2, device=GPU), torch.ones(2), torch.tensor(3.0)
        assert (there.device, here.device) == (GPU, torch.device("cpu"))
        assert is_on_gpu(there * number)
        assert is_on_gpu(there.view(1, 2).sum()) and not is_on_gpu(here.sum())
        assert (
            is_on_gpu(here.to(there.device))
            and is_on_gpu(here.to(there))
            and is_on_gpu(here.cuda())
        )
        assert not is_on_gpu(there.cpu()) and not is_on_gpu(there.new_ones(2, device="cpu"))
        here.copy_(there)
        assert is_on_gpu(there[torch.tensor([0])])
        for meet in (
            lambda: there + here,
            lambda: torch.stack([there.sum(), number]),
            lambda: torch.cat([there, here]),
            lambda: number.add_(there.sum()),
        ):
            with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
                meet()
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
