"""Gradients of weights that all tensor-parallel ranks hold and each uses on part of the work.

A QK-norm sees a rank's own heads, a replicated FA projection its slice of the sequence, so every
rank ends with a partial gradient. They are summed once per step, after the data-parallel reduction,
as Megatron-Core does for layer norms under sequence parallelism. Summing inside the backward pass
would be wrong twice: per micro-batch it costs a collective for every weight, and a rank without
heads of a kind would not take part in it.
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
    """Say that each tensor-parallel rank holds a part of these parameters' gradients."""
    for parameter in parameters:
        setattr(parameter, _PARTIAL, True)


def finalize_gradients(
    model: Sequence[torch.nn.Module],
    num_tokens: torch.Tensor | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool = False,
) -> None:
    """Megatron-Core's ``finalize_model_grads``, then the sum of partial gradients.

    Use as ``config.finalize_model_grads_func``. Every parameter is divided by ``num_tokens`` by
    Megatron-Core already, and sums commute with that.

    Args:
        model: chunks wrapped in Megatron-Core's ``DistributedDataParallel``.
        num_tokens: tokens of the global batch, to normalise by.
        pg_collection: process groups; Megatron-Core's own when absent.
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
