"""Context parallelism over contiguous shards: what each branch of a layer exchanges (design §6).

GDN passes states: one ``[H, d, dv + d]`` map per shard, whatever the sequence length. The short
convolution passes a halo of W−1 tokens. FA gathers keys and values and trades half of its queries
with the mirror rank (r ↔ N−1−r), which makes causal work equal on all ranks without any zigzag
layout outside the branch. What a window of tokens needs is in :mod:`.token_window`.

All functions take the process group to work over, are differentiable, run the same collectives on
every rank whatever the documents look like, and reduce to local work for a group of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_hydra.ops.sharded_delta_rule import (
    Shard,
    ShardMap,
    entering_state,
    leaving_gradient,
    shards_of,
)
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


class _PassStates(torch.autograd.Function):
    """The state that enters this rank's shard, from its own map; both ways a gather and a short scan."""

    @staticmethod
    def forward(
        ctx: Any, states: ShardStates, transition: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        (entering,), transitions = states.enter([ShardMap(state, transition)], state)
        ctx.states = states
        entering = torch.zeros_like(state) if entering is None else entering.clone()
        ctx.save_for_backward(transitions, entering)
        return entering

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        transitions, entering = ctx.saved_tensors
        (leaving,) = ctx.states.leave([grads[0]], transitions, entering)
        by_state = torch.zeros_like(entering) if leaving is None else leaving
        by_transition = by_state @ entering.transpose(-1, -2)
        if not ctx.states.held[0].through:
            by_transition = torch.zeros_like(by_transition)
        return None, by_transition, by_state


@dataclasses.dataclass(frozen=True)
class ShardStates:
    """Passes GDN states between the shards of one stream; an ``ops.sharded_delta_rule.StateExchange``.

    Every rank gathers every shard's map and composes those that it needs itself: one collective each way.

    Attributes:
        group: the context-parallel ranks, which hold the shards in their order.
        cu_seqlens_global: document boundaries of the whole stream.
    """

    group: dist.ProcessGroup
    cu_seqlens_global: tuple[int, ...]

    @property
    def _shards(self) -> tuple[Shard, ...]:
        return shards_of(self.cu_seqlens_global, self.group.size())

    @property
    def held(self) -> tuple[Shard, ...]:
        """This rank's shard."""
        return (self._shards[self.group.rank()],)

    def enter(
        self, maps: Sequence[ShardMap], like: torch.Tensor
    ) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
        """As :meth:`.StateExchange.enter`; sends nothing where no document crosses a shard's end, and no
        transitions where no document goes through a whole shard.
        """
        ((state, transition),) = maps
        parts = [torch.zeros_like(like) if state is None else state]
        if any(shard.through for shard in self._shards):
            if transition is None:
                transition = like.new_zeros(*like.shape[:-1], like.shape[-2])
            parts.append(transition)
        gathered = self._gathered(torch.cat(parts, dim=-1))
        if gathered is None:
            return [None], None
        states, *rest = gathered.split([part.shape[-1] for part in parts], dim=-1)
        transitions = rest[0] if rest else None
        return [entering_state(states, transitions, self._shards, self.group.rank())], transitions

    def leave(
        self,
        gradients: Sequence[torch.Tensor | None],
        transitions: torch.Tensor | None,
        like: torch.Tensor,
    ) -> list[torch.Tensor | None]:
        """As :meth:`.StateExchange.leave`."""
        (gradient,) = gradients
        gathered = self._gathered(torch.zeros_like(like) if gradient is None else gradient)
        if gathered is None:
            return [None]
        return [leaving_gradient(gathered, transitions, self._shards, self.group.rank())]

    def __call__(self, transition: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """As :meth:`.StateExchange.__call__`."""
        entering: torch.Tensor = _PassStates.apply(self, transition, state)
        return entering

    def _gathered(self, x: torch.Tensor) -> torch.Tensor | None:
        """All ranks' ``x``, stacked; ``None`` where no document crosses a shard's end."""
        if not any(shard.goes_on for shard in self._shards):
            return None
        out = x.new_empty(self.group.size(), *x.shape)
        dist.all_gather_into_tensor(out, x[None].contiguous(), group=self.group)
        return out


def state_exchange(packed: PackedSequence, group: dist.ProcessGroup) -> ShardStates | None:
    """How a shard learns the GDN state that enters it; ``None`` without context parallelism."""
    return None if group.size() == 1 else ShardStates(group, packed.cu_seqlens)


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
    # A rank's two blocks differ in size. An exchange between them would make it wait for the larger one of its
    # mirror rank, forward and backward. Autograd reverses the order, so this exchange comes last there.
    q_mirror = _Swap.apply(q_local[half:], group, mirror)
    own = _attend(q_local[:half], k, v, packed, start, start + half, attention)
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
