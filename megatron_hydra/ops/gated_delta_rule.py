"""The gated delta rule, chunked, over packed documents and across context-parallel shards.

    S_t = (I − β_t k_t k_tᵀ) α_t S_{t−1} + β_t k_t v_tᵀ        o_t = S_tᵀ q_t / √d

(design §2; Yang et al., Gated Delta Networks, arXiv 2412.06464). In Kimi Delta Attention (KDA; Kimi Linear,
arXiv 2510.26692) α_t is a diagonal matrix: every channel of the keys has a decay. A chunk of C tokens turns
the recurrence into matrix products: with g the running sum of log α inside the chunk and Γ_ij = exp(g_i − g_j),

    (I + A) [W | U] = diag(β) [diag(e^g) K | V]        A = strictly lower part of diag(β)(K Kᵀ ∘ Γ)
    S' = (e^{g_C} I − K̃ᵀ W) S + K̃ᵀ U                   K̃ = diag(e^{g_C − g}) K
    O  = (diag(e^g) Q − P W) S + P U                   P = lower part of Q Kᵀ ∘ Γ

so every chunk is an affine map of its incoming state, S' = M S + B. With a decay a channel, g has d columns,
diag(e^g) K is e^g ∘ K, e^{g_C} I is diag(e^{g_C}), and Γ moves into the sums over channels, as in
(K Kᵀ ∘ Γ)_ij = Σ_c k_ic k_jc exp(g_ic − g_jc). There are three steps, for a few chunks at a time: build their
maps, scan the states over the chunks of each document, compute the outputs. Only the scan is sequential, and
only the scan depends on documents and shards. So packing and context parallelism change nothing else: a shard's
own map (M, S_ext) is a scan of its last document fragment, and the states that enter later shards are a scan
over the gathered maps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from megatron_hydra.ops.determinism import is_deterministic
from megatron_hydra.ops.device_cache import int_tensor
from megatron_hydra.ops.integers import next_power_of_2
from megatron_hydra.ops.sharded_delta_rule import StateExchange

MIN_CHUNK, MAX_CHUNK = 16, 64
"""Bounds of the chunk length in tokens. Work within chunks grows with it, and work of the scan shrinks. Both
are about equal at the head dimension, which is the default within these bounds."""

GROUP_ELEMENTS = 1 << 19
"""Elements of the widest tensor of a group of chunks whose maps are built together: 2 MB in fp32, so that the
output of one operation is still in the cache for the next."""


def recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: tuple[int, ...] | None = None,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, token by token: the plain twin of :func:`chunked_gated_delta_rule`.

    It has the same arguments and results and computes in the inputs' dtype. It is slow, for tests and
    self-checks.
    """
    cu = cu_seqlens or (0, q.shape[0])
    outputs, finals = [], []
    scale = q.shape[-1] ** -0.5
    decays = log_alpha.exp().view(*log_alpha.shape[:2], -1, 1)  # [T, H, d or 1, 1]
    for n in range(len(cu) - 1):
        if initial_state is None:
            state = q.new_zeros(q.shape[1], q.shape[2], v.shape[2])
        else:
            state = initial_state[n].to(q.dtype)
        for t in range(cu[n], cu[n + 1]):
            state = state * decays[t]
            error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
            state = state + torch.einsum("hk,hv->hkv", k[t], error * beta[t][:, None])
            outputs.append(torch.einsum("hkv,hk->hv", state, q[t]) * scale)
        finals.append(state)
    return torch.stack(outputs), torch.stack(finals)


@dataclasses.dataclass(frozen=True)
class ChunkLayout:
    """How documents are cut into chunks; it depends only on the document lengths.

    Chunks are numbered step-major: first the first chunk of every document (longest document
    first), then the second chunks, and so on, so that a scan step works on one contiguous slice.

    Attributes:
        chunk: tokens of a chunk.
        gather: ``[N·C]`` stream index of every chunk slot, ``T`` for padding; ``None`` if slots are exactly the
            stream's tokens in order.
        scatter: ``[T]`` chunk slot of every token, ``None`` likewise.
        widths: for each scan step, the number of documents that still have a chunk.
        order: scan position → document, longest first.
        last_step: for each document, the step of its last chunk.
    """

    chunk: int
    gather: torch.Tensor | None
    scatter: torch.Tensor | None
    widths: tuple[int, ...]
    order: tuple[int, ...]
    last_step: tuple[int, ...]

    @property
    def num_chunks(self) -> int:
        """Chunks of all documents together."""
        return sum(self.widths)

    @property
    def first_chunk_of_step(self) -> tuple[int, ...]:
        """Number of the first chunk of every step."""
        starts, total = [], 0
        for width in self.widths:
            starts.append(total)
            total += width
        return tuple(starts)


@functools.lru_cache(maxsize=8)  # 16 bytes per token: the streams of a few micro-batches
def chunk_layout(cu_seqlens: tuple[int, ...], chunk: int, device: torch.device) -> ChunkLayout:
    """The chunks of documents with the given boundaries (cached: layers of a model share it)."""
    lengths = [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    total = cu_seqlens[-1]
    counts = [-(-length // chunk) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: -counts[i])
    widths = tuple(sum(count > step for count in counts) for step in range(max(counts)))

    rank = {document: position for position, document in enumerate(order)}
    starts, running = [], 0
    for width in widths:
        starts.append(running)
        running += width
    gather = torch.full((running, chunk), total, dtype=torch.int64)
    for document, length in enumerate(lengths):
        index = torch.arange(cu_seqlens[document], cu_seqlens[document] + length)
        padded = F.pad(index, (0, counts[document] * chunk - length), value=total)
        slots = torch.tensor([starts[s] + rank[document] for s in range(counts[document])])
        gather[slots] = padded.view(-1, chunk)
    flat = gather.reshape(-1)
    if flat.numel() == total and torch.equal(flat, torch.arange(total)):
        gather_or_none = scatter_or_none = None
    else:
        scatter = torch.empty(total + 1, dtype=torch.int64)
        scatter[flat] = torch.arange(flat.numel())
        gather_or_none, scatter_or_none = flat.to(device), scatter[:total].to(device)
    return ChunkLayout(
        chunk=chunk,
        gather=gather_or_none,
        scatter=scatter_or_none,
        widths=widths,
        order=tuple(order),
        last_step=tuple(count - 1 for count in counts),
    )


def chunked_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: tuple[int, ...] | None = None,
    initial_state: torch.Tensor | None = None,
    *,
    chunk: int | None = None,
    exchange: StateExchange | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated delta rule over a packed stream; differentiable in every tensor argument.

    Args:
        q, k: ``[T, H, d]``, k usually of unit norm.
        v: ``[T, H, dv]``.
        log_alpha: ``[T, H]``, log of the decay, ≤ 0; ``[T, H, d]``: of each channel of the keys.
        beta: ``[T, H]``, write strength in (0, 1).
        cu_seqlens: boundaries of the documents (or fragments), ``0 … T``; one document when absent.
        initial_state: ``[N, H, d, dv]``, the state each document starts from; zeros when absent.
        chunk: chunk length in tokens; chosen from d when absent.
        exchange: for a context-parallel shard, gives the state that enters the first fragment.

    Returns:
        Output ``[T, H, dv]`` in ``q``'s dtype and final states ``[N, H, d, dv]`` in the dtype of the
        computation: float32, or float64 for float64 inputs.
    """
    cu = cu_seqlens or (0, q.shape[0])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    longest = max(b - a for a, b in zip(cu, cu[1:], strict=False))
    chunk = chunk or min(MAX_CHUNK, max(MIN_CHUNK, next_power_of_2(q.shape[-1])))
    chunk = min(chunk, max(MIN_CHUNK, next_power_of_2(longest)))
    layout = chunk_layout(cu, chunk, q.device)

    decays = log_alpha.view(*log_alpha.shape[:2], -1)
    chunks = [_to_chunks(x.to(wide), layout) for x in (q, k, v, decays, beta[..., None])]
    maps = None
    if exchange is not None:  # the entering state is known only after all maps
        maps = _chunk_maps(*chunks)
        transition, state = _shard_map(maps, layout, len(cu) - 2)
        first = exchange(transition, state)
        rest = first.new_zeros(len(cu) - 2, *first.shape)
        initial_state = torch.cat((first[None], rest))
    output, finals = _outputs(chunks, layout, initial_state, maps)
    return _from_chunks(output, layout).to(q.dtype), finals


@dataclasses.dataclass(frozen=True)
class _ChunkMaps:
    """Every chunk as an affine map of its incoming state; all ``[N, H, …]``."""

    transition: torch.Tensor  # M  [N, H, d, d]
    write: torch.Tensor  # B  [N, H, d, dv]
    read: torch.Tensor  # O = read · S + own_output  [N, H, C, d]
    own_output: torch.Tensor  # [N, H, C, dv]


def _to_chunks(x: torch.Tensor, layout: ChunkLayout) -> torch.Tensor:
    """``[T, H, c]`` → ``[N, H, C, c]``; padded slots are zero, which leaves states unchanged."""
    if layout.gather is not None:
        x = F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(0, layout.gather)
    return x.view(layout.num_chunks, layout.chunk, *x.shape[1:]).transpose(1, 2)


def _from_chunks(x: torch.Tensor, layout: ChunkLayout) -> torch.Tensor:
    """Inverse of :func:`_to_chunks`."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if layout.scatter is None else x.index_select(0, layout.scatter)


def _chunk_maps(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    beta: torch.Tensor,
) -> _ChunkMaps:
    """The affine map of every chunk; inputs ``[N, H, C, ·]``."""
    d, size = q.shape[-1], q.shape[-2]
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    g = _running_sum(log_alpha, causal)
    products = (_products_by_head if g.shape[-1] == 1 else _products_by_channel)(k, g, causal)
    grown = g.exp()

    attention = products(k) * beta
    right = torch.cat((k * (beta * grown), v * beta), dim=-1)
    # unitriangular reads only the strictly lower part of its argument: the diagonal counts as 1.
    solved = torch.linalg.solve_triangular(attention, right, upper=False, unitriangular=True)

    to_end = (k * (g[..., -1:, :] - g).exp()).transpose(-1, -2)
    pushed = to_end @ solved
    eye = torch.eye(d, dtype=q.dtype, device=q.device)
    transition = eye * grown[..., -1:, :] - pushed[..., :d]

    scaled = q * d**-0.5
    read_out = products(scaled) @ solved
    return _ChunkMaps(
        transition=transition,
        write=pushed[..., d:],
        read=scaled * grown - read_out[..., :d],
        own_output=read_out[..., d:],
    )


_Products = Callable[[torch.Tensor], torch.Tensor]


def _products_by_head(k: torch.Tensor, g: torch.Tensor, causal: torch.Tensor) -> _Products:
    """X -> X Kᵀ ∘ Γ, ``[N, H, C, d]`` -> ``[N, H, C, C]``, zero above the diagonal; ``g [N, H, C, 1]``."""
    # Masked before exp: above the diagonal g_i − g_j is positive and may overflow.
    decay = (g - g.transpose(-1, -2)).masked_fill(~causal, float("-inf")).exp()
    return lambda x: (x @ k.transpose(-1, -2)) * decay


def _products_by_channel(k: torch.Tensor, g: torch.Tensor, causal: torch.Tensor) -> _Products:
    """The same with Γ of each channel inside the sum; ``g [N, H, C, d]``.

    exp(−g) alone would overflow if a channel decays fast. So rows are computed in blocks. Keys before a block
    have the weight exp(g_i − r) · exp(r − g_j), where r is g just before the block and both exponents are
    negative. Within a block every pair has its own exponent.
    """
    size, block = k.shape[-2], min(MIN_CHUNK, k.shape[-2])
    starts = range(block, size, block)
    before = [g[:, :, start - 1 : start] for start in starts]
    inside, keys = (x.unflatten(-2, (-1, block)) for x in (g, k))
    gaps = inside[..., :, None, :] - inside[..., None, :, :]
    gaps = gaps.masked_fill(~causal[:block, :block, None], float("-inf"))
    near = (gaps.exp() * keys[..., None, :, :]).transpose(-1, -2)  # [N, H, blocks, B, d, B]
    far = [
        (k[:, :, :start] * (r - g[:, :, :start]).exp()).transpose(-1, -2)
        for start, r in zip(starts, before, strict=True)
    ]
    since = [(inside[:, :, index] - r).exp() for index, r in enumerate(before, start=1)]

    def products(x: torch.Tensor) -> torch.Tensor:
        rows = x.unflatten(-2, (-1, block))
        own = (rows[..., None, :] @ near).squeeze(-2)  # [N, H, blocks, B, B]
        blocks = [F.pad(own[:, :, 0], (0, size - block))]
        for index, (weight, earlier) in enumerate(zip(since, far, strict=True), start=1):
            crossing = (rows[:, :, index] * weight) @ earlier
            joined = torch.cat((crossing, own[:, :, index]), dim=-1)
            blocks.append(F.pad(joined, (0, size - joined.shape[-1])))
        return torch.cat(blocks, dim=-2)

    return products


def _running_sum(x: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
    """Sums of ``x [N, H, C, 1 or d]`` up to every token of a chunk, in deterministic runs in fixed order."""
    if x.is_cuda and is_deterministic():  # torch has no deterministic cumsum on a GPU
        return causal.to(x.dtype) @ x
    return x.cumsum(-2)


def widest_elements(queries: int, values: int, by_channel: bool) -> int:
    """Elements of the widest tensor of a chunk; ``queries`` and ``values`` are those of its q and v."""
    return queries * MIN_CHUNK if by_channel else queries + values


def step_groups(widths: Sequence[int], elements: int) -> list[tuple[int, ...]]:
    """Widths of the scan's steps in groups of neighbours; groups are small.

    Args:
        widths: of all steps.
        elements: of the widest tensor of one chunk.
    """
    groups: list[list[int]] = [[]]
    for width in widths:
        if groups[-1] and (sum(groups[-1]) + width) * elements > GROUP_ELEMENTS:
            groups.append([])
        groups[-1].append(width)
    return [tuple(group) for group in groups]


def _outputs(
    chunks: list[torch.Tensor],
    layout: ChunkLayout,
    initial_state: torch.Tensor | None,
    all_maps: _ChunkMaps | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs ``[N, H, C, dv]`` of all chunks and the state ``[n, H, d, dv]`` after every document.

    Args:
        chunks: q, k, v, log α and β, ``[N, H, C, ·]``.
        layout: the order of the chunks.
        initial_state: ``[n, H, d, dv]``; zeros when absent.
        all_maps: the maps of all chunks, if they exist already.
    """
    q, v, by_channel = chunks[0], chunks[2], chunks[3].shape[-1] > 1
    if initial_state is None:
        state = q.new_zeros(layout.widths[0], q.shape[1], q.shape[3], v.shape[3])
    else:
        state = _permuted(initial_state.to(q.dtype), layout.order)
    groups = [layout.widths]
    if all_maps is None:
        groups = step_groups(layout.widths, widest_elements(q[0].numel(), v[0].numel(), by_channel))
    sizes = [sum(group) for group in groups]
    # split instead of slices: the gradient of n slices would be n tensors of full size.
    parts = zip(*(x.split(sizes) for x in chunks), strict=True)
    after = iter((*layout.widths[1:], 0))
    outputs, finals = [], []
    for widths, part in zip(groups, parts, strict=True):
        maps = all_maps or _chunk_maps(*part)
        entering = []
        transitions, writes = maps.transition.split(widths), maps.write.split(widths)
        for transition, write in zip(transitions, writes, strict=True):
            entering.append(state)
            state = _affine(transition, state, write)
            going_on = next(after)
            if going_on < state.shape[0]:
                state, ended = state.split((going_on, state.shape[0] - going_on))
                finals.append(ended)
        states = torch.cat(entering).flatten(0, 1)
        output = torch.baddbmm(maps.own_output.flatten(0, 1), maps.read.flatten(0, 1), states)
        outputs.append(output.view_as(maps.own_output))
    # The longest documents come first in scan order and end last.
    final = torch.cat(finals[::-1])
    inverse = sorted(range(len(layout.order)), key=lambda position: layout.order[position])
    return torch.cat(outputs), _permuted(final, tuple(inverse))


def _permuted(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """``x[order]`` along the first axis; returns ``x`` if the order is the identity."""
    if order == tuple(range(len(order))):
        return x
    return x.index_select(0, int_tensor(order, torch.int64, x.device))


def _affine(transition: torch.Tensor, state: torch.Tensor, write: torch.Tensor) -> torch.Tensor:
    """M S + B, batched over leading dimensions."""
    flat = torch.baddbmm(write.flatten(0, 1), transition.flatten(0, 1), state.flatten(0, 1))
    return flat.view_as(write)


def _shard_map(
    maps: _ChunkMaps, layout: ChunkLayout, fragment: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transition ``[H, d, d]`` of one fragment, and its final state ``[H, d, dv]`` from a zero state."""
    position = layout.order.index(fragment)
    starts = layout.first_chunk_of_step
    chunks = tuple(starts[step] + position for step in range(layout.last_step[fragment] + 1))
    index = int_tensor(chunks, torch.int64, maps.write.device)
    transitions = maps.transition.index_select(0, index).unbind(0)
    writes = maps.write.index_select(0, index).unbind(0)
    transition, state = transitions[0], writes[0]
    for step_transition, write in zip(transitions[1:], writes[1:], strict=True):
        state = torch.baddbmm(write, step_transition, state)
        transition = step_transition @ transition
    return transition, state
