"""Each fix of Megatron-Core's optimizer corrects a fault, which a case shows without the fix."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_hydra.config.run import OptimizerConfig, ParallelConfig, RunConfig
from megatron_hydra.parallel.world import World
from megatron_hydra.training import megatron_fixes, setup
from megatron_hydra.training.model_state import model_state, sharding_metadata
from megatron_hydra.transfer.finetune import NextToken
from tests.training import tiny

pytestmark = pytest.mark.usefixtures("one_rank")

FULLY_RESHARDABLE = "sharded_param_state_fully_reshardable"


def _trained(monkeypatch: pytest.MonkeyPatch) -> tuple[list, MegatronOptimizer]:
    """A model in fp32 after one step, whose gradient buffer has many buckets, and its optimizer."""
    # By default a bucket has 40 million parameters, so a real model has many buckets, a test's model one.
    many = functools.partial(DistributedDataParallelConfig, bucket_size=1)
    monkeypatch.setattr(setup, "DistributedDataParallelConfig", many)
    config = RunConfig(
        verb="finetune",
        precision="fp32",
        optimizer=OptimizerConfig(lr=0.1),
        parallel=ParallelConfig(overlap_grad_reduce=True),
    )
    chunks = setup.build_chunks(tiny.student_config(), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in chunks[0].parameters():
        parameter.data.normal_(generator=generator)
    world = World(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, False)
    wrapped = setup.wrap_for_training(chunks, NextToken(config, world, []), config)
    optimizer = setup.build_optimizer(wrapped, config)
    (buffer,) = wrapped[0].buffers
    padded = [bucket.grad_data.numel() > bucket.numel_unpadded for bucket in buffer.buckets]
    assert any(padded[:-1]), "the case needs padding before the last bucket"
    for parameter in chunks[0].parameters():
        parameter.main_grad.normal_(generator=generator)  # type: ignore[attr-defined]
    optimizer.step()
    return chunks, optimizer


def _wrong_master_weights(chunks: list, optimizer: MegatronOptimizer) -> tuple[int, int]:
    """The number of parameters that Megatron would save with another one's values, and the number of all."""
    model = model_state(chunks)
    state = optimizer.sharded_state_dict(model, metadata=sharding_metadata())
    weights = {entry.key: entry.data for entry in model["model0"].values()}
    masters = {entry["param"].key: entry["param"].data for entry in state["param_state"].values()}
    assert masters.keys() == {f"optimizer.state.param.{key}" for key in weights}
    # In fp32 a weight equals its master weight.
    equal = [torch.equal(masters[f"optimizer.state.param.{key}"], weights[key]) for key in weights]
    return equal.count(False), len(equal)


def test_master_weights_are_read_at_their_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, of = _wrong_master_weights(*_trained(monkeypatch))
    assert of > 20
    assert wrong == 0


def test_upstream_still_reads_them_at_wrong_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the newest supported release has no fault: state in the fix which releases need it."""
    chunks, optimizer = _trained(monkeypatch)
    monkeypatch.setattr(DistributedOptimizer, FULLY_RESHARDABLE, megatron_fixes._original_sharded)
    wrong, of = _wrong_master_weights(chunks, optimizer)
    assert wrong > of // 2


def test_no_padding_is_reported_when_a_checkpoint_is_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Loading requests the same slices; without the fix, Megatron warns of corruption for each parameter."""
    chunks, optimizer = _trained(monkeypatch)
    with caplog.at_level(logging.WARNING):
        optimizer.sharded_state_dict(
            model_state(chunks), is_loading=True, metadata=sharding_metadata()
        )
    assert not [record.getMessage() for record in caplog.records]


def test_every_parameter_counts_its_own_steps_after_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch's AdamW adds one for each parameter, so a shared counter would count many times too fast."""
    chunks, optimizer = _trained(monkeypatch)
    (part,) = optimizer.chained_optimizers  # type: ignore[attr-defined]
    shared = torch.tensor(7.0)
    for state in part.optimizer.state.values():
        state["step"] = shared
    for parameter in chunks[0].parameters():
        tensors = part._get_main_param_and_optimizer_states(parameter)
        part._set_main_param_and_optimizer_states(
            parameter, {name: tensors[name].clone() for name in ("param", "exp_avg", "exp_avg_sq")}
        )
    for parameter in chunks[0].parameters():
        parameter.main_grad.fill_(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert {float(state["step"]) for state in part.optimizer.state.values()} == {8.0}
