"""Test support: a model's parameters and gradients as a canonical state dict, without any file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory


def _sharded(model: torch.nn.Module) -> dict:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = model.sharded_state_dict(metadata=metadata)
    return {k: v for k, v in state.items() if isinstance(v, (ShardedTensor, ShardedTensorFactory))}


def _index(shard: ShardedTensor) -> tuple[slice, ...]:
    """Where a shard lies in its global tensor (prepended axes have length one)."""
    prepended = shard.prepend_axis_num
    lengths = (1,) * prepended + tuple(shard.local_shape)
    return tuple(slice(o, o + n) for o, n in zip(shard.global_offset, lengths, strict=True))


def _slice(full: torch.Tensor, shard: ShardedTensor) -> torch.Tensor:
    piece = full[_index(shard)]
    return piece.reshape(shard.local_shape)


def load(model: torch.nn.Module, canonical: dict[str, torch.Tensor]) -> None:
    """Fill the local parameters of ``model`` from a full canonical state dict."""
    for entry in _sharded(model).values():
        if isinstance(entry, ShardedTensorFactory):
            pieces = [_slice(canonical[s.key], s) for s in _flat(entry.build())]
            entry.data.data.copy_(entry.merge_fn(pieces))
        else:
            entry.data.data.copy_(_slice(canonical[entry.key], entry))


def _flat(built) -> list[ShardedTensor]:
    shards = built.values() if isinstance(built, dict) else built
    return [shard for shard in shards if isinstance(shard, ShardedTensor)]


def gather(
    model: torch.nn.Module,
    read: Callable[[torch.Tensor], torch.Tensor | None],
    *,
    of_the_world: bool = True,
) -> dict[str, torch.Tensor]:
    """Gather full canonical tensors: for every parameter, what ``read`` returns.

    Args:
        read: maps a parameter to a tensor of its shape (``p``, ``p.grad``, ``p.main_grad``) or ``None``.
        of_the_world: gather from all ranks, which must all call this. Otherwise this rank must have the whole
            model.
    """
    local: list[tuple[str, tuple, tuple, Packed]] = []
    for entry in _sharded(model).values():
        value = read(entry.data)
        if value is None:
            continue
        if isinstance(entry, ShardedTensorFactory):
            shards = _flat(entry.build_fn(entry.key, value, entry.replica_id, None))
        else:
            shards = [entry]
        for shard in shards:
            data = shard.data if isinstance(entry, ShardedTensorFactory) else value
            local.append((shard.key, shard.global_shape, _index(shard), pack(data)))
    everything: list = [local]
    if of_the_world and dist.is_initialized() and dist.get_world_size() > 1:
        everything = [None] * dist.get_world_size()
        dist.all_gather_object(everything, local)
    full: dict[str, torch.Tensor] = {}
    for part in everything:
        for key, shape, index, packed in part:
            data = unpack(packed)
            if key not in full:
                full[key] = torch.full(shape, float("nan"), dtype=data.dtype)
            full[key][index] = data.reshape(full[key][index].shape)
    return full


Packed = tuple[np.ndarray, torch.dtype, tuple[int, ...]]
"""A tensor's bytes, dtype and shape."""


def pack(tensor: torch.Tensor) -> Packed:
    """A copy that is quick to send. Pickling a tensor itself takes 1 ms (it becomes a file of torch.save)."""
    flat = tensor.detach().cpu().clone().reshape(-1)
    return flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape)


def unpack(packed: Packed) -> torch.Tensor:
    """The tensor of :func:`pack`."""
    data, dtype, shape = packed
    return torch.from_numpy(data).view(dtype).reshape(shape)
