"""A window of tokens under context parallelism: attention within the window, and delayed writes.

Both need the tokens before a shard: a halo from the previous rank, as for the short convolution. All functions
are differentiable and run the same collectives on every rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_hydra.parallel.context_parallel import Attention, from_previous, gather_sequence
from megatron_hydra.parallel.packed_sequence import PackedSequence


def preceding_tokens(x_local: torch.Tensor, count: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The ``count`` tokens before this shard, ``[count, …]``; zeros before the stream's first token.

    They come from the previous rank if its shard is long enough, else from a gather of all shards.
    """
    length = x_local.shape[0]
    if group.size() == 1 or count == 0:
        return x_local.new_zeros(count, *x_local.shape[1:])
    if count <= length:
        return from_previous(x_local[length - count :], group)
    start = group.rank() * length
    found = gather_sequence(x_local, group)[max(0, start - count) : start]
    return torch.cat((x_local.new_zeros(count - found.shape[0], *x_local.shape[1:]), found))


def delayed(
    x_local: torch.Tensor, steps: int, packed: PackedSequence, group: dist.ProcessGroup
) -> torch.Tensor:
    """For every token of this shard the value ``steps`` tokens earlier in its document.

    Args:
        x_local: ``[T_local, …]``.
        steps: at least 1.
        packed: layout of documents and shard.
        group: the context-parallel ranks.

    Returns:
        ``[T_local, …]``; exactly zero if the document has no token at that position.
    """
    before = preceding_tokens(x_local, steps, group)
    shifted = torch.cat((before, x_local))[: x_local.shape[0]]
    inside = packed.positions_local >= steps
    return torch.where(inside.view(-1, *(1,) * (x_local.dim() - 1)), shifted, 0)


def windowed_attention(
    q_local: torch.Tensor,
    k_local: torch.Tensor,
    v_local: torch.Tensor,
    packed: PackedSequence,
    group: dist.ProcessGroup,
    attention: Attention,
    window: int,
) -> torch.Tensor:
    """Attention of every query to the last ``window`` keys, in this shard and in the halo before it.

    Every query has the same work, so the mirror rank does not exchange work.

    Args:
        q_local, k_local, v_local, packed, group, attention: as in
            :func:`~megatron_hydra.parallel.context_parallel.sharded_attention`.
        window: number of keys that a query sees, its own included.

    Returns:
        ``[T_global / N, n, d]``.
    """
    length, halo = q_local.shape[0], window - 1
    start = group.rank() * length
    block = packed.cached(
        ("block", start, window),
        lambda: packed.attention_block(start, start + length, window),
    )
    k, v = k_local, v_local
    if group.size() > 1:
        d, kv_local = k_local.shape[-1], torch.cat((k_local, v_local), dim=-1)
        kv = torch.cat((preceding_tokens(kv_local, halo, group), kv_local))
        k, v = kv[block.k_start - start + halo :].split((d, d), dim=-1)
    return attention(q_local, k, v, block.cu_q, block.cu_k, window=window)
