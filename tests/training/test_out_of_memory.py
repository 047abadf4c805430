"""Out of memory: the error names settings to change, the used memory and the planner's estimate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.out_of_memory import out_of_memory_names
from megatron_hydra.planning.plan import expected_memory
from megatron_hydra.training import loop
from megatron_hydra.training.loop import run_training
from megatron_hydra.training.out_of_memory import out_of_memory_explained, training_advice
from tests.training import tiny

TORCH_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB."


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card that the message names."""
    from megatron_hydra.parallel import platform

    monkeypatch.setattr(platform, "device_memory_bytes", lambda: 80 * 2**30)
    monkeypatch.setattr(platform, "device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(platform, "peak_memory_bytes", lambda: 78 * 2**30)


def test_a_step_of_a_run(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, h100: None
) -> None:
    """A step raises it; the run ends with one line and without process groups."""

    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError(TORCH_SAYS)

    monkeypatch.setattr(loop, "train_step", full)
    config = tiny.run_config(inputs, "finetune", str(tmp_path / "run"))
    with pytest.raises(HydraError) as error:
        run_training(config)
    text = str(error.value)
    expected = expected_memory(tiny.student_config(), config, 1).total / 2**30
    for part in (
        "out of GPU memory in finetune: 78.0 GiB were in use at most of 80.0 GiB on NVIDIA H100",
        f"the planner expects a peak of {expected:.1f} GiB",
        "batch.micro_batch_size=1 (now 2",
        "recompute.granularity=selective",
        "CUDA out of memory",
    ):
        assert part in text
    assert "\n" not in text
    assert not torch.distributed.is_initialized()


def test_advice_names_only_settings_that_can_still_change(tmp_path: Path) -> None:
    def keys(verb: str = "distill", gdn: bool = False, **sections: Any) -> list[str]:
        advice = training_advice(tiny.run_config(tmp_path, verb, "run", **sections), gdn)
        return [text.split("=")[0].split(" ")[0] for text in advice]

    smaller = {"micro_batch_size": 4, "global_batch_size": 4}
    everything = keys(batch=smaller, loss={"chunk_tokens": 2048}, gdn=True)
    assert everything == [
        "backend.gated_delta_net", "batch.micro_batch_size", "recompute.granularity",
        "recompute.granularity", "loss.chunk_tokens", "more",
    ]  # fmt: skip
    nothing = keys(
        batch={"micro_batch_size": 1, "global_batch_size": 4}, recompute={"granularity": "full"},
    )  # fmt: skip
    assert nothing == ["more"]
    assert "loss.chunk_tokens" not in keys("align", loss={"chunk_tokens": 2048})


def test_other_errors_pass(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        out_of_memory_explained(tiny.run_config(tmp_path, "finetune", "run")),
    ):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="nccl"), out_of_memory_names("x", "y"):
        raise RuntimeError("nccl")


def test_without_a_model_the_planner_is_left_out(tmp_path: Path, h100: None) -> None:
    config = tiny.run_config(tmp_path, "finetune", "run")
    with pytest.raises(HydraError) as error, out_of_memory_explained(config):
        raise torch.OutOfMemoryError(TORCH_SAYS)
    assert "planner" not in str(error.value)
    assert "batch.micro_batch_size" in str(error.value)


def test_a_plan_without_fla_needs_more(inputs: Path) -> None:
    """If ``auto`` falls back to the torch GDN, the expected peak is that of torch."""
    config = tiny.run_config(
        inputs, "distill", "run", data={"sequence_length": 4096}, precision="bf16"
    )
    model = dataclasses.replace(tiny.student_config(), head_dim=64)
    backend = dataclasses.replace(config.backend, gated_delta_net="torch")
    slow = dataclasses.replace(config, backend=backend)
    assert expected_memory(model, slow, 1).total > 1.5 * expected_memory(model, config, 1).total
    with (
        pytest.raises(HydraError, match="several times the memory of FLA's kernels"),
        out_of_memory_explained(config),
    ):
        raise torch.OutOfMemoryError(TORCH_SAYS)


def test_tools_name_their_options(h100: None) -> None:
    with (
        pytest.raises(HydraError, match=r"memory in the evaluation: 78.* --batch-tokens 4; or b"),
        out_of_memory_names("the evaluation", "--batch-tokens 4", "b"),
    ):
        raise torch.OutOfMemoryError(TORCH_SAYS)
