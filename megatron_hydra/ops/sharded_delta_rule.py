"""The gated delta rule of a context-parallel shard, for any kernels with states as inputs and outputs.

A fragment of a document maps the state that enters it to the state that leaves it, S' = M S + B (equations in
:mod:`.gated_delta_rule`). A shard needs one thing from the others: the state that enters its first fragment. So
a shard computes in four steps (:class:`ShardKernels`), with one small collective in the forward and one in the
backward:

    1. its own map: the transition M and the state B that a zero state leaves behind; all ranks get all maps
    2. outputs from the right entering state: a scan over the maps of the shards before this one
    3. its own gradient by the entering state, from the gradients of its outputs alone; all ranks get all
    4. the gradients of its inputs, from the right gradient by the state that leaves: the same scan from
       right to left, where the adjoint of a map is dS = Mᵀ dS' + dS_own

Only the fragments at a shard's edges take part. The scan stops at documents that begin and end within a shard,
and at shards within which a document ends.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

Saved = tuple[torch.Tensor | None, ...]
"""Tensors that a step keeps for later steps."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One contiguous shard of a packed stream.

    Attributes:
        start, end: global indices of its first token and after its last.
        cu_seqlens: boundaries of its fragments, ``0 … T_local``.
        begun: whether its first fragment's document began in an earlier shard.
        goes_on: whether its last fragment's document continues in the next shard.
    """

    start: int
    end: int
    cu_seqlens: tuple[int, ...]
    begun: bool
    goes_on: bool

    @property
    def through(self) -> bool:
        """Whether it lies within one document that began before it and continues after it. Only then does the
        leaving state depend on the entering state.
        """
        return self.begun and self.goes_on and len(self.cu_seqlens) == 2


@functools.lru_cache(maxsize=64)
def shards_of(cu_seqlens: tuple[int, ...], size: int) -> tuple[Shard, ...]:
    """A stream's shards of equal length.

    Args:
        cu_seqlens: document boundaries of the whole stream, ``0 … T_global``.
        size: number of shards; T_global is a multiple.
    """
    length = cu_seqlens[-1] // size
    inner = frozenset(cu_seqlens)
    shards = []
    for start in range(0, cu_seqlens[-1], length):
        end = start + length
        cuts = (start, *(c for c in cu_seqlens if start < c < end), end)
        local = tuple(c - start for c in cuts)
        shards.append(Shard(start, end, local, start not in inner, end not in inner))
    return tuple(shards)


class ShardMap(NamedTuple):
    """A shard's last fragment as a map of states, fp32 or fp64.

    Attributes:
        state: ``[H, d, dv]``, the final state from a zero state; ``None`` if the document ends here.
        transition: ``[H, d, d]``; ``None`` if no document goes through the shard.
    """

    state: torch.Tensor | None
    transition: torch.Tensor | None


def entering_state(
    states: torch.Tensor, transitions: torch.Tensor | None, shards: Sequence[Shard], rank: int
) -> torch.Tensor | None:
    """The state ``[H, d, dv]`` that enters shard ``rank``; ``None`` if a document begins with it.

    Args:
        states: ``[N, H, d, dv]``, of all shards' maps; not read for a shard in which its last document ends.
        transitions: ``[N, H, d, d]``; may be ``None`` if no shard is :attr:`Shard.through`.
        shards: all N.
        rank: whose.
    """
    state = None
    for before in range(rank):
        if not shards[before].goes_on:
            state = None
        elif state is not None and shards[before].through:
            assert transitions is not None
            state = torch.baddbmm(states[before], transitions[before], state)
        else:
            state = states[before]
    return state


def leaving_gradient(
    gradients: torch.Tensor, transitions: torch.Tensor | None, shards: Sequence[Shard], rank: int
) -> torch.Tensor | None:
    """The gradient ``[H, d, dv]`` by the state that leaves shard ``rank``; ``None`` if no state leaves it.

    Args:
        gradients: ``[N, H, d, dv]``, of each shard's outputs by the state that enters it.
        transitions: ``[N, H, d, d]``, as for :func:`entering_state`.
        shards: all N.
        rank: whose.
    """
    gradient = None
    for after in range(len(shards) - 1, rank, -1):
        if not shards[after].begun:
            gradient = None
        elif gradient is not None and shards[after].through:
            assert transitions is not None
            transposed = transitions[after].transpose(-1, -2)
            gradient = torch.baddbmm(gradients[after], transposed, gradient)
        else:
            gradient = gradients[after]
    return gradient


class StateExchange(Protocol):
    """How the shards of a process get the states of the other shards.

    ``parallel.context_parallel.ShardStates`` holds one shard of a process group, :class:`ShardsHere` all.
    """

    @property
    def group(self) -> torch.distributed.ProcessGroup:
        """The ranks that share the sequence, in the order of their shards."""
        ...

    @property
    def cu_seqlens_global(self) -> tuple[int, ...]:
        """Document boundaries of the whole stream."""
        ...

    @property
    def held(self) -> tuple[Shard, ...]:
        """The shards of this process; together they are the tokens that it computes."""
        ...

    def enter(
        self, maps: Sequence[ShardMap], like: torch.Tensor
    ) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
        """The state that enters each held shard (:func:`entering_state`), and all shards' transitions.

        Args:
            maps: of the held shards.
            like: a state ``[H, d, dv]`` for shape, dtype and device.
        """
        ...

    def leave(
        self,
        gradients: Sequence[torch.Tensor | None],
        transitions: torch.Tensor | None,
        like: torch.Tensor,
    ) -> list[torch.Tensor | None]:
        """The gradient by the state that leaves each held shard (:func:`leaving_gradient`).

        Args:
            gradients: of the held shards' outputs by their entering states.
            transitions: as :meth:`enter` gave them.
            like: as for :meth:`enter`.
        """
        ...

    def __call__(self, transition: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The state ``[H, d, dv]`` that enters the first fragment, from the transition ``[H, d, d]`` and state
        ``[H, d, dv]`` of the last fragment. It is differentiable, and for a process with one shard.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ShardsHere:
    """All shards of a stream in one process, one after the other, without any communication.

    The start-up check, tests and benchmarks use it: kernels compute the same as on so many ranks.

    Attributes:
        cu_seqlens_global: document boundaries of the stream.
        size: how many shards.
    """

    cu_seqlens_global: tuple[int, ...]
    size: int

    @property
    def group(self) -> torch.distributed.ProcessGroup:
        """There is none."""
        raise NotImplementedError("the shards of one process have no process group")

    @property
    def held(self) -> tuple[Shard, ...]:
        """All of them."""
        return shards_of(self.cu_seqlens_global, self.size)

    def enter(
        self, maps: Sequence[ShardMap], like: torch.Tensor
    ) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
        """As :meth:`StateExchange.enter`."""
        states = _stacked([m.state for m in maps], like)
        transitions = None
        if any(shard.through for shard in self.held):
            square = like.new_empty(*like.shape[:-1], like.shape[-2])
            transitions = _stacked([m.transition for m in maps], square)
        ranks = range(self.size)
        return [entering_state(states, transitions, self.held, r) for r in ranks], transitions

    def leave(
        self,
        gradients: Sequence[torch.Tensor | None],
        transitions: torch.Tensor | None,
        like: torch.Tensor,
    ) -> list[torch.Tensor | None]:
        """As :meth:`StateExchange.leave`."""
        stacked = _stacked(gradients, like)
        return [leaving_gradient(stacked, transitions, self.held, r) for r in range(self.size)]

    def __call__(self, transition: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """For a rule that takes the whole stream as one shard: no state enters it."""
        return torch.zeros_like(state)


def _stacked(parts: Sequence[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.zeros_like(like) if part is None else part for part in parts])


class ShardKernels(Protocol):
    """Kernels of one shard's four steps. Each returns its result and the tensors that later steps need.

    ``inputs`` are q, k, v, log α and β of the shard, as for
    :func:`~megatron_hydra.ops.gated_delta_rule.chunked_gated_delta_rule`. States are ``[H, d, dv]`` in
    fp32 (fp64 for fp64 inputs). The kernels leave out what a :class:`Shard` does not need: the map if no
    document continues, the entering gradient if no document began earlier.
    """

    def shard_map(self, shard: Shard, inputs: tuple[torch.Tensor, ...]) -> tuple[ShardMap, Saved]:
        """Step 1."""
        ...

    def output(
        self,
        shard: Shard,
        inputs: tuple[torch.Tensor, ...],
        saved: Saved,
        entering: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Saved]:
        """Step 2: the output ``[T, H, dv]``, and all further tensors that the backward needs."""
        ...

    def entering_gradient(
        self, shard: Shard, inputs: tuple[torch.Tensor, ...], saved: Saved, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, Saved]:
        """Step 3: the gradient ``[H, d, dv]`` by the entering state, as if no state left the shard."""
        ...

    def gradients(
        self,
        shard: Shard,
        inputs: tuple[torch.Tensor, ...],
        saved: Saved,
        partial: Saved,
        grad: torch.Tensor,
        leaving: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """Step 4: the gradients of the inputs.

        Args:
            shard, inputs: as in the steps before.
            saved: of step 2.
            partial: of step 3.
            grad: ``[T, H, dv]``, of the output.
            leaving: ``[H, d, dv]``, by the state that leaves the shard; ``None`` if no state leaves it.
        """
        ...


def sharded_gated_delta_rule(
    kernels: ShardKernels,
    inputs: tuple[torch.Tensor, ...],
    exchange: StateExchange,
) -> torch.Tensor:
    """The output ``[T, H, dv]`` of this process's shards; differentiable in the inputs.

    Args:
        kernels: compute a shard.
        inputs: q, k, v, log α, β of the held shards, one after the other.
        exchange: connects them to the others. All ranks run the same collectives.
    """
    training = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    output: torch.Tensor = _Sharded.apply(kernels, exchange, training, *inputs)
    return output


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: ShardKernels,
        exchange: StateExchange,
        training: bool,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        like = empty_state(inputs)
        held = list(zip(exchange.held, _parts(exchange, inputs), strict=True))
        mapped = [kernels.shard_map(shard, part) for shard, part in held]
        states, transitions = exchange.enter([m for m, _ in mapped], like)
        outputs, kept = [], []
        for (shard, part), (_, saved), state in zip(held, mapped, states, strict=True):
            output, saved = kernels.output(shard, part, saved, state)
            outputs.append(output)
            kept.append(saved if training else ())
        ctx.kernels, ctx.exchange, ctx.counts = kernels, exchange, [len(saved) for saved in kept]
        ctx.save_for_backward(*inputs, transitions, *(x for saved in kept for x in saved))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kernels, exchange = ctx.kernels, ctx.exchange
        inputs, transitions = ctx.saved_tensors[:5], ctx.saved_tensors[5]
        rest = iter(ctx.saved_tensors[6:])
        kept = [tuple(next(rest) for _ in range(count)) for count in ctx.counts]
        steps = list(
            zip(
                exchange.held,
                _parts(exchange, inputs),
                kept,
                _parts(exchange, grads),
                strict=True,
            )
        )
        own = [kernels.entering_gradient(shard, x, saved, g) for shard, x, saved, (g,) in steps]
        leaving = exchange.leave(
            [by_state for by_state, _ in own], transitions, empty_state(inputs)
        )
        by_shard = [
            kernels.gradients(shard, x, saved, partial, g, last)
            for (shard, x, saved, (g,)), (_, partial), last in zip(steps, own, leaving, strict=True)
        ]
        if len(by_shard) == 1:
            return (None, None, None, *by_shard[0])
        together = (torch.cat(parts) for parts in zip(*by_shard, strict=True))
        return (None, None, None, *together)


def empty_state(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """An uninitialised state ``[H, d, dv]`` of a shard's inputs, fp32 (fp64 for fp64)."""
    q, v = inputs[0], inputs[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[1], q.shape[2], v.shape[2], dtype=wide)


def as_inputs(
    gradients: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Gradients of kernels that take a batch of one row, ``[1, T, …]``, in the inputs' shapes and dtypes."""
    return tuple(x[0].to(like.dtype) for x, like in zip(gradients, inputs, strict=True))


def _parts(
    exchange: StateExchange, tensors: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, ...]]:
    """The held shards' slices of tensors ``[T, …]``."""
    held = exchange.held
    if len(held) == 1:
        return [tuple(x.contiguous() for x in tensors)]
    first = held[0].start
    return [tuple(x[s.start - first : s.end - first].contiguous() for x in tensors) for s in held]


Rule = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclasses.dataclass(frozen=True)
class RuleKernels:
    """A shard's steps by a whole rule with start states and final states: the plain twin.

    The map is two runs of the last fragment: from a zero state, and from the identity with v = 0. The backward
    runs the shard twice, with and without the gradient by the leaving state. This is several times the work of
    kernels that compute only states.

    Attributes:
        rule: as :func:`~megatron_hydra.ops.gated_delta_rule.chunked_gated_delta_rule`.
    """

    rule: Rule

    def shard_map(self, shard: Shard, inputs: tuple[torch.Tensor, ...]) -> tuple[ShardMap, Saved]:
        """As :meth:`ShardKernels.shard_map`."""
        if not shard.goes_on:
            return ShardMap(None, None), ()
        q, k, v, log_alpha, beta = (x[shard.cu_seqlens[-2] :] for x in inputs)
        cu, transition = (0, q.shape[0]), None
        _, state = self.rule(q, k, v, log_alpha, beta, cu)
        assert state is not None
        if shard.through:
            eye = torch.eye(k.shape[2], dtype=state.dtype, device=k.device)
            identity = eye.expand(1, k.shape[1], -1, -1)
            _, final = self.rule(q, k, torch.zeros_like(k), log_alpha, beta, cu, identity)
            assert final is not None
            transition = final[0]
        return ShardMap(state[0], transition), ()

    def output(
        self,
        shard: Shard,
        inputs: tuple[torch.Tensor, ...],
        saved: Saved,
        entering: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Saved]:
        """As :meth:`ShardKernels.output`."""
        states = start_states(shard, entering, empty_state(inputs))
        return self.rule(*inputs, shard.cu_seqlens, states)[0], (states,)

    def entering_gradient(
        self, shard: Shard, inputs: tuple[torch.Tensor, ...], saved: Saved, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, Saved]:
        """As :meth:`ShardKernels.entering_gradient`."""
        if not shard.begun:
            return None, ()
        (states,) = saved
        assert states is not None
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            output, _ = self.rule(*(x.detach() for x in inputs), shard.cu_seqlens, leaf)
            (by_states,) = torch.autograd.grad(output, leaf, grad)
        return by_states[0], ()

    def gradients(
        self,
        shard: Shard,
        inputs: tuple[torch.Tensor, ...],
        saved: Saved,
        partial: Saved,
        grad: torch.Tensor,
        leaving: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """As :meth:`ShardKernels.gradients`."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            output, finals = self.rule(*leaves, shard.cu_seqlens, saved[0])
            assert finals is not None
            results, grads = [output], [grad]
            if leaving is not None:
                results.append(finals[-1])
                grads.append(leaving)
            return torch.autograd.grad(results, leaves, grads)


def start_states(shard: Shard, entering: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """``[N, H, d, dv]``: what each fragment of a shard starts from."""
    states = like.new_zeros(len(shard.cu_seqlens) - 1, *like.shape)
    if entering is not None:
        states[0] = entering
    return states


def final_gradients(shard: Shard, leaving: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """``[N, H, d, dv]``: the gradient by the state that each fragment of a shard ends with."""
    gradients = like.new_zeros(len(shard.cu_seqlens) - 1, *like.shape)
    if leaving is not None:
        gradients[-1] = leaving
    return gradients
