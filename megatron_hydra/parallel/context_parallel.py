"""Context parallelism over contiguous shards: what each branch of a layer exchanges (design §6).

GDN passes states: one ``[H, d, d + dv]`` map per shard, whatever the sequence length. The short
convolution passes a halo of W−1 tokens. FA gathers keys and values and trades half of its queries
with the mirror rank (r ↔ N−1−r), which makes causal work equal on all ranks without any zigzag
layout outside the branch. What a window of tokens needs is in :mod:`.token_window`.

All functions take the process group to work over, are differentiable, run the same collectives on
every rank whatever the documents look like, and reduce to local work for a group of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_hydra.parallel.packed_sequence import PackedSequence

Attention = Callable[..., torch.Tensor]
"""As :func:`megatron_hydra.ops.varlen_attention.varlen_attention`."""


def _send_receive(
    x: torch.Tensor, group: dist.ProcessGroup, to: int | None, source: int | None
) -> torch.Tensor:
    """Send ``x`` to group rank ``to`` and return what ``source`` sent (zeros if ``None``)."""
    x = x.contiguous()
    received = torch.zeros_like(x)
    operations = []
    if to is not None:
        peer = dist.get_global_rank(group, to)
        operations.append(dist.P2POp(dist.isend, x, peer, group))
    if source is not None:
        peer = dist.get_global_rank(group, source)
        operations.append(dist.P2POp(dist.irecv, received, peer, group))
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    return received


class _Swap(torch.autograd.Function):
    """Trade a tensor with another rank of the group; its own inverse and its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, peer: int) -> torch.Tensor:
        ctx.group, ctx.peer = group, peer
        return _send_receive(x, group, peer, peer)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _send_receive(grads[0], ctx.group, ctx.peer, ctx.peer), None, None


class _FromPrevious(torch.autograd.Function):
    """The previous rank's tensor; zeros on the first rank. The gradient goes back to its owner."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        ctx.before, ctx.after = _neighbours(group)
        return _send_receive(x, group, ctx.after, ctx.before)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _send_receive(grads[0], ctx.group, ctx.before, ctx.after), None


def from_previous(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The previous rank's ``x``, zeros on the first rank; backward sends the gradient to its owner."""
    received: torch.Tensor = _FromPrevious.apply(x, group)
    return received


def _neighbours(group: dist.ProcessGroup) -> tuple[int | None, int | None]:
    rank, size = group.rank(), group.size()
    return (rank - 1 if rank > 0 else None), (rank + 1 if rank + 1 < size else None)


class _Gather(torch.autograd.Function):
    """Concatenate the ranks' tensors along the first axis; gradients are summed and scattered."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        x = x.contiguous()
        out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
        dist.all_gather_into_tensor(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _reduce_scatter(grads[0], ctx.group), None


def _reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x, group=group)
    return out


def gather_sequence(x_local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' ``[T_local, …]`` as ``[T_local · N, …]``; backward reduce-scatters the gradient."""
    return x_local if group.size() == 1 else _Gather.apply(x_local, group)


class _KeepInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
        ctx.shape, ctx.dtype, ctx.device = unused.shape, unused.dtype, unused.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grads[0], torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device)


def keep_in_graph(x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
    """``x``, made to depend on ``unused`` with a zero gradient.

    A rank that has no use for the result of a collective must still run its backward, or the other
    ranks wait for it for ever.
    """
    result: torch.Tensor = _KeepInGraph.apply(x, unused)
    return result


# -- short convolution ----------------------------------------------------------------------------


def convolution_halo(
    x_local: torch.Tensor, width: int, group: dist.ProcessGroup
) -> torch.Tensor | None:
    """The W−1 tokens before this shard, ``[W−1, C]``; ``None`` where nothing can precede it.

    Args:
        x_local: ``[T_local, C]``, the convolution's input on this rank; T_local ≥ W−1.
        width: W.
        group: the context-parallel group.
    """
    if group.size() == 1 or width == 1:
        return None
    return from_previous(x_local[x_local.shape[0] - (width - 1) :], group)


# -- Gated DeltaNet states ------------------------------------------------------------------------


def _entering_state(
    maps: torch.Tensor, rank: int, passes: tuple[bool, ...], whole: tuple[bool, ...]
) -> torch.Tensor:
    """Compose the maps ``[N, H, d, d + dv]`` of the shards before ``rank``: the state that enters it.

    Args:
        maps: for each shard, transition and own state of its last fragment.
        rank: whose entering state is wanted.
        passes: whether the shard's last fragment goes on in the next shard.
        whole: whether the shard lies inside a single document begun before it.
    """
    d = maps.shape[2]
    state = maps.new_zeros(*maps.shape[1:3], maps.shape[3] - d)
    for shard in range(rank):
        if not passes[shard]:
            state = torch.zeros_like(state)
            continue
        transition, own = maps[shard, ..., :d], maps[shard, ..., d:]
        state = torch.baddbmm(own, transition, state) if whole[shard] else own
    return state


class _PassStates(torch.autograd.Function):
    """All-gather the shards' maps and compose those before this rank.

    One function for both, so that every rank takes part in the backward collective even where a
    document boundary cuts its own state off.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shard_map: torch.Tensor,
        group: dist.ProcessGroup,
        passes: tuple[bool, ...],
        whole: tuple[bool, ...],
    ) -> torch.Tensor:
        maps = shard_map.new_empty(group.size(), *shard_map.shape)
        dist.all_gather_into_tensor(maps, shard_map[None].contiguous(), group=group)
        ctx.save_for_backward(maps)
        ctx.group, ctx.passes, ctx.whole = group, passes, whole
        return _entering_state(maps, group.rank(), passes, whole)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (maps,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = maps.detach().requires_grad_()
            state = _entering_state(leaf, ctx.group.rank(), ctx.passes, ctx.whole)
            if state.requires_grad:
                (grad,) = torch.autograd.grad(state, leaf, grads[0])
            else:
                grad = torch.zeros_like(maps)
        return _reduce_scatter(grad, ctx.group).squeeze(0), None, None, None


@dataclasses.dataclass(frozen=True)
class ShardStates:
    """Passes GDN states between the shards of one stream; an ``ops.gated_delta_rule.StateExchange``.

    Attributes:
        group: the context-parallel ranks.
        cu_seqlens_global: document boundaries of the whole stream.
        passes: for each shard, whether its last fragment goes on in the next one.
        whole: for each shard, whether it lies inside a single document begun before it.
    """

    group: dist.ProcessGroup
    cu_seqlens_global: tuple[int, ...]
    passes: tuple[bool, ...]
    whole: tuple[bool, ...]

    def __call__(self, transition: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """This shard's map (of its last fragment, from a zero state) → the state that enters it."""
        shard_map = torch.cat((transition, state), dim=-1)
        entering: torch.Tensor = _PassStates.apply(shard_map, self.group, self.passes, self.whole)
        return entering


def state_exchange(packed: PackedSequence, group: dist.ProcessGroup) -> ShardStates | None:
    """How a shard learns the GDN state that enters it; ``None`` without context parallelism."""
    size = group.size()
    if size == 1:
        return None
    length = packed.length_local
    boundaries = set(packed.cu_seqlens)
    passes, whole = [], []
    for shard in range(size):
        block = packed.attention_block(shard * length, (shard + 1) * length)
        passes.append((shard + 1) * length not in boundaries)
        whole.append(len(block.cu_q) == 2 and block.k_start < block.q_start)
    return ShardStates(group, packed.cu_seqlens, tuple(passes), tuple(whole))


# -- full attention -------------------------------------------------------------------------------


def sharded_attention(
    q_local: torch.Tensor,
    k_local: torch.Tensor,
    v_local: torch.Tensor,
    packed: PackedSequence,
    group: dist.ProcessGroup,
    attention: Attention,
) -> torch.Tensor:
    """Causal attention of contiguous sequence shards, documents kept apart.

    Args:
        q_local: ``[T_global / N, n, d]``, queries of shard ``group.rank()``.
        k_local, v_local: ``[T_global / N, g, d]``.
        packed: the stream's documents.
        group: the N ranks that share the sequence, in the order of their shards: the
            context-parallel group, or tensor × context where FA is partitioned by sequence.
        attention: the kernel, as :func:`megatron_hydra.ops.varlen_attention.varlen_attention`.

    Returns:
        ``[T_global / N, n, d]``.
    """
    size, rank, length = group.size(), group.rank(), q_local.shape[0]

    if size == 1:
        return _attend(q_local, k_local, v_local, packed, 0, length, attention)
    d = k_local.shape[-1]
    k, v = gather_sequence(torch.cat((k_local, v_local), dim=-1), group).split((d, d), dim=-1)

    mirror, half, start = size - 1 - rank, length // 2, rank * length
    if mirror == rank or half == 0:
        return _attend(q_local, k, v, packed, start, start + length, attention)
    own = _attend(q_local[:half], k, v, packed, start, start + half, attention)
    q_mirror = _Swap.apply(q_local[half:], group, mirror)
    traded = _attend(
        q_mirror, k, v, packed, mirror * length + half, (mirror + 1) * length, attention
    )
    return torch.cat((own, _Swap.apply(traded, group, mirror)))


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: PackedSequence,
    start: int,
    end: int,
    attention: Attention,
) -> torch.Tensor:
    """Queries ``start:end`` of the stream against the keys that their documents allow."""
    block = packed.cached(("block", start, end), lambda: packed.attention_block(start, end))
    if (block.k_start, block.k_end) != (0, k.shape[0]):
        k, v = k[block.k_start : block.k_end], v[block.k_start : block.k_end]
    return attention(q, k, v, block.cu_q, block.cu_k)
