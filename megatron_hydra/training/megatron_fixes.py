"""Fixes that Megatron-Core's distributed optimizer needs to load a checkpoint correctly, in all releases.

All supported releases, 0.16.1 to 0.19.2, need each fix. tests/training/test_megatron_fixes.py checks the
installed release, and fails as soon as upstream is correct. Differences between releases are in
:mod:`megatron_hydra.parallel.megatron_versions`. The import of :mod:`megatron_hydra.training.checkpoint`
applies the fixes once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, distrib_optimizer
from torch import Tensor

_original = distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states
_original_sharded = distrib_optimizer.DistributedOptimizer.sharded_param_state_fully_reshardable


@torch.no_grad()
def _set_main_param_and_optimizer_states(
    self: distrib_optimizer.DistributedOptimizer,
    model_param: torch.nn.Parameter,
    tensors: dict[str, Tensor],
) -> None:
    if distrib_optimizer.HAVE_APEX_OR_TE:
        _original(self, model_param, tensors)
        return
    group, order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group]["params"][order]
    state = self.optimizer.state[main_param]
    main_param.copy_(tensors["param"])
    for name in ("exp_avg", "exp_avg_sq"):
        state[name].copy_(tensors[name])
    # After loading, all parameters share one step tensor. torch increments it once per parameter, and
    # training silently diverges from the second resumed step on.
    state["step"] = state["step"].clone()


distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states = (
    _set_main_param_and_optimizer_states
)


@contextlib.contextmanager
def _padding_counted(buffers: list[Any]) -> Iterator[None]:
    """Make gradient buffers report their padded sizes as their sizes."""
    holders = [holder for buffer in buffers for holder in (buffer, *buffer.buckets)]
    sizes = [holder.numel_unpadded for holder in holders]
    try:
        for buffer in buffers:
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()
        yield
    finally:
        for holder, size in zip(holders, sizes, strict=True):
            holder.numel_unpadded = size


def _sharded_param_state_fully_reshardable(
    self: distrib_optimizer.DistributedOptimizer, *args: Any, **kwargs: Any
) -> Any:
    # Upstream joins the buckets of a buffer without their padding, but cuts out parameters at padded
    # offsets. From the second bucket on (with a tied embedding under pipeline parallelism, or with
    # overlap_grad_reduce) the optimizer state and the master weights are shifted. We save with
    # optimizer_state.py, so the fault would appear in a load: the last parameters would be too short, and
    # upstream would warn that they are corrupt.
    with _padding_counted(self.buffers):
        return _original_sharded(self, *args, **kwargs)


distrib_optimizer.DistributedOptimizer.sharded_param_state_fully_reshardable = (
    _sharded_param_state_fully_reshardable
)


def allocate_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Give an unused optimizer its state tensors, so that a checkpoint can be loaded into them.

    It changes parameters (by weight decay): call it only directly before loading them.
    """
    assert isinstance(optimizer, ChainedOptimizer)
    for part in optimizer.chained_optimizers:
        if isinstance(part, distrib_optimizer.DistributedOptimizer):
            part._init_optimizer_states_with_dummy_values()


def has_state(optimizer: MegatronOptimizer) -> bool:
    """Whether the optimizer has made a step (Megatron cannot save one that has not)."""
    assert isinstance(optimizer, ChainedOptimizer)
    return any(part.optimizer.state for part in optimizer.chained_optimizers if part.optimizer)
