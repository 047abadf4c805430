"""The optimizer's part of a checkpoint: the whole state of each parameter, on the rank that writes it.

Megatron's distributed optimizer holds flat ranges of a buffer on each data-parallel rank. Its own save
copies every tensor to the host, back to the device for a gather, to the host again, and sends all tensors
to every rank. Here each part is sent once, from its rank to the rank that writes the parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_hydra.training.model_state import SHARDING, sharding_metadata, writer_of
from megatron_hydra.training.snapshot import Snapshot

_STATES = ("param", "exp_avg", "exp_avg_sq")
_BATCH_BYTES = 64 * 2**20
"""Approximate size of the parameters in one exchange. A device needs little more memory than this."""

Entry: TypeAlias = ShardedTensor | ShardedTensorFactory


def add_optimizer_state(
    optimizer: MegatronOptimizer, model: dict[str, Any], snapshot: Snapshot
) -> dict[str, Any]:
    """Add the optimizer state that this rank writes to a snapshot. Collective.

    Args:
        optimizer: must have made a step.
        model: Megatron's sharded state dict of the model, which assigns parameters to writers.

    Returns:
        State that is not sharded: parameter groups and step.
    """
    assert isinstance(optimizer, ChainedOptimizer)
    parts = optimizer.chained_optimizers
    if len(parts) == 1:
        return _add_part(parts[0], model, snapshot)
    optimizer._synchronize_steps()
    return {i: _add_part(part, model, snapshot) for i, part in enumerate(parts)}  # type: ignore[misc]


def _add_part(part: MegatronOptimizer, model: dict[str, Any], snapshot: Snapshot) -> dict[str, Any]:
    if not isinstance(part, DistributedOptimizer):
        state = part.sharded_state_dict(model, metadata=sharding_metadata())
        _, state = extract_nonpersistent(state)
        sharded, common = extract_sharded_base(state)
        snapshot.add(sharded)
        return common
    entries: dict[int, Entry] = {id(entry.data): entry for entry in nested_values(model)}
    for parameter, name, tensor in _whole_states(part, entries):
        entry = entries[id(parameter)]
        changed: dict[str, Any] = {"key": f"optimizer.state.{name}.{entry.key}", "data": tensor}
        if isinstance(entry, ShardedTensor):
            changed["dtype"] = tensor.dtype
        # Exchanged tensors are copies already.
        is_copy = part.data_parallel_group.size() > 1
        snapshot.add(dataclasses.replace(entry, **changed), is_copy=is_copy)
    return part.state_dict() | {
        "param_state_sharding_type": SHARDING["distrib_optim_sharding_type"]
    }


def _whole_states(
    part: DistributedOptimizer, entries: dict[int, Entry]
) -> Iterator[tuple[torch.nn.Parameter, str, Tensor]]:
    """Yield (parameter, name of a state, state in the parameter's shape) for the states that it writes."""
    group = part.data_parallel_group
    for buffer in part.buffers:
        if group.size() == 1:
            for parameter in buffer.param_index_map:
                if writer_of(entries[id(parameter)]) is None:
                    continue
                states = part._get_main_param_and_optimizer_states(parameter)
                for name in _STATES:
                    yield parameter, name, states[name].detach().float().view(parameter.shape)
            continue
        for batch in _batches(buffer, entries):
            for name in _STATES:
                yield from _exchanged(part, buffer, batch, name)


@dataclasses.dataclass(frozen=True)
class _Share:
    """A parameter, the rank of the group that writes it, and the number of its elements on each rank."""

    parameter: torch.nn.Parameter
    writer: int
    lengths: tuple[int, ...]


def _batches(buffer: Any, entries: dict[int, Entry]) -> Iterator[list[_Share]]:
    batch: list[_Share] = []
    num_bytes = 0
    for parameter in buffer.param_index_map:
        writer = writer_of(entries[id(parameter)])
        if writer is None:  # the group of another tensor-parallel rank writes it
            continue
        batch.append(_Share(parameter, writer, _lengths(buffer, parameter)))
        num_bytes += 4 * parameter.numel()
        if num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _lengths(buffer: Any, parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Number of elements of a parameter on each data-parallel rank: ranks hold equal ranges of a bucket."""
    start, end, bucket_id = buffer.param_index_map[parameter]
    bucket, ranks = buffer.buckets[bucket_id], buffer.data_parallel_group.size()
    size = bucket.grad_data.numel() // ranks
    edges = [bucket.offset + rank * size for rank in range(ranks + 1)]
    return tuple(
        max(0, min(end, high) - max(start, low))
        for low, high in zip(edges, edges[1:], strict=False)
    )


def _exchanged(
    part: DistributedOptimizer, buffer: Any, batch: list[_Share], name: str
) -> Iterator[tuple[torch.nn.Parameter, str, Tensor]]:
    group = part.data_parallel_group
    ranks, me = group.size(), group.rank()
    device = buffer.grad_data.device
    to = [[s for s in batch if s.writer == writer and s.lengths[me]] for writer in range(ranks)]
    sent = [
        part._get_main_param_and_optimizer_states(share.parameter)[name].detach().float().view(-1)
        for shares in to
        for share in shares
    ]
    own = [share for share in batch if share.writer == me]
    received = torch.empty(
        sum(sum(share.lengths) for share in own), dtype=torch.float32, device=device
    )
    dist.all_to_all_single(
        received,
        torch.cat(sent) if sent else received.new_empty(0),
        output_split_sizes=[sum(share.lengths[rank] for share in own) for rank in range(ranks)],
        input_split_sizes=[sum(share.lengths[me] for share in shares) for shares in to],
        group=group,
    )
    # Ordered by rank, then by parameter: a parameter is its parts joined in the order of ranks.
    parts = iter(received.split([s.lengths[rank] for rank in range(ranks) for s in own]))
    by_rank = [[next(parts) for _ in own] for _ in range(ranks)]
    for share, pieces in zip(own, zip(*by_rank, strict=True), strict=True):
        yield share.parameter, name, torch.cat(pieces).view(share.parameter.shape)
