"""Gradients of replicated weights that each tensor-parallel rank uses for a part of the work.

A QK-norm sees only a rank's own heads, and a replicated FA projection sees only the rank's slice of the
sequence. So every rank has a partial gradient. These are summed once per step, after the data-parallel
reduction, as Megatron-Core does for layer norms under sequence parallelism. Two reasons forbid a sum inside the
backward pass: it would need a collective per weight and micro-batch, and a rank without heads of a kind would
not take part in the collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection

_PARTIAL = "hydra_partial_gradient"


def mark_partial(*parameters: torch.nn.Parameter) -> None:
    """Mark parameters whose gradients on each tensor-parallel rank are partial."""
    for parameter in parameters:
        setattr(parameter, _PARTIAL, True)


def finalize_gradients(
    model: Sequence[torch.nn.Module],
    num_tokens: torch.Tensor | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool = False,
) -> None:
    """Megatron-Core's ``finalize_model_grads``, then the sum of partial gradients.

    Use it as ``config.finalize_model_grads_func``. Megatron-Core divides every gradient by ``num_tokens``
    before, and a sum commutes with this division.

    Args:
        model: chunks wrapped in Megatron-Core's ``DistributedDataParallel``.
        num_tokens: number of tokens of the global batch, for normalisation.
        pg_collection: process groups; ``None``: Megatron-Core's own.
        force_all_reduce: all-reduce instead of reduce-scatter, see Megatron-Core.
    """
    finalize_model_grads(model, num_tokens, pg_collection, force_all_reduce=force_all_reduce)
    group = (
        pg_collection.tp
        if pg_collection is not None
        else parallel_state.get_tensor_model_parallel_group()
    )
    if group.size() == 1:
        return
    grads: list[Any] = [
        parameter.main_grad  # type: ignore[attr-defined]  # set by Megatron-Core's DDP
        for chunk in model
        for parameter in chunk.parameters()
        if parameter.requires_grad and getattr(parameter, _PARTIAL, False)
    ]
    if not grads:
        return
    joined = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(joined, group=group)
    for grad, piece in zip(grads, joined.split([g.numel() for g in grads]), strict=True):
        grad.copy_(piece.view_as(grad))
