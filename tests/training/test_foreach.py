"""Functions on lists of parameters give the results of Megatron-Core's functions for single parameters."""

from __future__ import annotations

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads

from megatron_hydra.config.run import OptimizerConfig, RunConfig
from megatron_hydra.parallel import platform
from megatron_hydra.parallel.world import World
from megatron_hydra.training import foreach
from megatron_hydra.training.setup import build_chunks, build_optimizer, wrap_for_training
from megatron_hydra.transfer.finetune import NextToken
from tests.training import tiny

FLAG = torch.zeros(1, dtype=torch.int)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def tensors(device: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 5), (7,), (2, 2, 2)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("device", DEVICES)
def test_norm_of_a_list(device):
    found, _ = foreach.l2_norm(0, FLAG, [tensors(device)], False)
    expected = torch.cat([tensor.flatten() for tensor in tensors(device)]).norm()
    assert found.shape == (1,)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norm_shows_what_is_not_finite(bad):
    made = tensors("cpu")
    made[1][3] = bad
    assert not foreach.l2_norm(0, FLAG, [made], False)[0].isfinite()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("to", ["itself", "another", "bf16"])
def test_scaling_a_list(device, factor, to):
    source, reference = tensors(device), tensors(device)
    dtype = torch.bfloat16 if to == "bf16" else torch.float32
    target = source if to == "itself" else [torch.empty_like(x, dtype=dtype) for x in source]
    expected = reference if to == "itself" else [x.clone() for x in target]
    foreach.scale(0, FLAG, [source, target], factor)
    utils.local_multi_tensor_scale(0, FLAG, [reference, expected], factor)
    for a, b in zip(target, expected, strict=True):
        assert torch.equal(a, b)


def test_scaling_nothing():
    foreach.scale(0, FLAG, [[], []], 0.5)


def test_they_replace_megatrons_fallbacks():
    stands_in = clip_grads.l2_norm_impl.__module__ != utils.__name__
    assert stands_in
    assert clip_grads.multi_tensor_scale_impl is not utils.local_multi_tensor_scale


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_updated_weights_are_those_that_megatron_copies(precision, monkeypatch):
    def trained(copy) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(
            foreach.distrib_optimizer.DistributedOptimizer,
            "_copy_main_params_to_model_params",
            copy,
        )
        config = RunConfig(verb="finetune", precision=precision, optimizer=OptimizerConfig(lr=0.1))
        chunks = build_chunks(tiny.student_config(), config)
        generator = torch.Generator(platform.device()).manual_seed(0)
        for parameter in chunks[0].parameters():
            parameter.data.normal_(generator=generator)
        world = World(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, False)
        wrapped = wrap_for_training(chunks, NextToken(config, world, []), config)
        optimizer = build_optimizer(wrapped, config)
        for parameter in chunks[0].parameters():
            parameter.main_grad.normal_(generator=generator)
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.prepare_grads()
        assert optimizer.step_with_ready_grads()
        return {name: p.detach().clone() for name, p in chunks[0].named_parameters()}

    expected = trained(foreach._copy_main_params)
    found = trained(foreach._copy_main_params_to_model_params)
    assert {tensor.dtype for tensor in found.values()} >= {
        torch.bfloat16 if precision == "bf16" else torch.float32
    }
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
