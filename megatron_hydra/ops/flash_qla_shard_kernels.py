"""A context-parallel shard's steps by FlashQLA's kernels (:class:`.sharded_delta_rule.ShardKernels`).

On one card FlashQLA cuts long fragments into parts of some chunks, because heads alone do not fill the card.
For this it already computes each part's map: the final state from a zero state and the transition
(``fused_gdr_h``), and in the backward the gradient by the part's entering state (``fused_gdr_dh``). A shard's
own map is the product of its parts' maps. So context parallelism adds little work: this product
(:func:`composed`), one collective, and the maps of the parts at the shard's edges, which a single card does not
need.

The order of the calls is FlashQLA's own (``flash_qla/ops/gated_delta_rule/chunk``, release 0.1.3, whose own
context parallelism has another exchange). As in FlashQLA, if the decay of a part has removed its past (e^−10),
only its last chunks are computed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from megatron_hydra.ops.device_cache import int_tensor
from megatron_hydra.ops.sharded_delta_rule import (
    Saved,
    Shard,
    ShardMap,
    as_inputs,
    empty_state,
    final_gradients,
    start_states,
)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The parts of a shard's fragments on one card. Tensors are int32 on the device, unless stated otherwise.

    Attributes:
        fragments: boundaries of the fragments.
        parts: boundaries of their parts; without cuts, those of the fragments.
        split: whether fragments are cut.
        of_fragment: ``[N + 1]``, the first part of every fragment, and the number of parts.
        of_part: ``[P]``, the fragment of every part; ``None`` without cuts.
        of_first, of_last: number of parts of the first and the last fragment.
        first, last: ``[2]``, boundaries of the first and the last fragment; only without cuts.
        first_chunks, last_chunks: ``[1, H]``, number of chunks of these; only without cuts.
        no_final, no_start: ``[P]`` bool, parts whose final state, or entering gradient, is not needed.
        ragged: chunks of the last part if its length is not a multiple of a chunk; else 0.
    """

    fragments: torch.Tensor
    parts: torch.Tensor
    split: bool
    of_fragment: torch.Tensor | None
    of_part: torch.Tensor | None
    of_first: int
    of_last: int
    first: torch.Tensor | None
    last: torch.Tensor | None
    first_chunks: torch.Tensor | None
    last_chunks: torch.Tensor | None
    no_final: torch.Tensor | None
    no_start: torch.Tensor | None
    ragged: int


@functools.lru_cache(maxsize=64)
def _parts(shard: Shard, heads: int, device: torch.device) -> _Parts:
    """FlashQLA's own cut of the fragments (for training; forward and backward must agree). FlashQLA omits some
    maps at a stream's ends; a shard's ends need them, so they are added.
    """
    from flash_qla.ops.gated_delta_rule.chunk import CHUNK_SIZE, build_cp_context

    cu = shard.cu_seqlens
    fragments = _counted(int_tensor(cu, torch.int32, device), cu)
    context = build_cp_context(
        fragments, enable_intra=True, num_v_heads=heads, chunk_size=CHUNK_SIZE, is_train=True
    )
    if not context.is_intra:
        first, last = (-(-(b - a) // CHUNK_SIZE) for a, b in (cu[:2], cu[-2:]))
        return _Parts(
            fragments, fragments, split=False, of_fragment=None, of_part=None, of_first=1, of_last=1,
            first=_counted(int_tensor(cu[:2], torch.int32, device), cu[:2]),
            last=_counted(int_tensor(cu[-2:], torch.int32, device), cu[-2:]),
            first_chunks=int_tensor((first,) * heads, torch.int32, device)[None],
            last_chunks=int_tensor((last,) * heads, torch.int32, device)[None],
            no_final=None, no_start=None, ragged=0,
        )  # fmt: skip
    parts, of_fragment = context.intra_cp_cu_seqlens, context.seq_map_r2c
    no_final, no_start = context.ht_mask.clone(), context.ht_mask_bwd.clone()
    if shard.goes_on:
        no_final[-1:].fill_(False)
    if shard.begun:
        no_start[:1].fill_(False)
    on_host = parts.tolist()
    length, counts = on_host[-1] - on_host[-2], of_fragment.diff().tolist()
    result = _Parts(
        fragments, _counted(parts, on_host), split=True, of_fragment=of_fragment, of_part=context.seq_map_c2r,
        of_first=counts[0], of_last=counts[-1], first=None, last=None,
        first_chunks=None, last_chunks=None, no_final=no_final, no_start=no_start,
        ragged=-(-length // CHUNK_SIZE) if length % CHUNK_SIZE else 0,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # copied once; any stream may read it now
    return result


def _counted(boundaries: torch.Tensor, on_host: Sequence[int]) -> torch.Tensor:
    """The same tensor, with the values that FlashQLA would otherwise read from the device to count chunks."""
    from flash_qla.utils.index import prepare_varlen_metadata

    prepare_varlen_metadata(boundaries, torch.tensor(on_host, dtype=boundaries.dtype))
    return boundaries


class FlashQlaShardKernels:
    """FlashQLA's kernels: d = dv = 128, bf16 or fp16 inputs, fp32 gates. FlashQLA passes maps between its
    kernels in the inputs' dtype.
    """

    def shard_map(self, shard: Shard, inputs: tuple[torch.Tensor, ...]) -> tuple[ShardMap, Saved]:
        """As :meth:`.ShardKernels.shard_map`."""
        from flash_qla.ops.gated_delta_rule import chunk as qla
        from flash_qla.ops.utils import chunk_local_cumsum

        _, k, v, log_alpha, beta = (x[None] for x in inputs)
        cut = _parts(shard, v.shape[2], v.device)
        g = chunk_local_cumsum(g=log_alpha, cu_seqlens=cut.fragments, chunk_size=qla.CHUNK_SIZE)
        a = qla.kkt_solve(k=k, b=beta, cu_seqlens=cut.fragments, chunk_size=qla.CHUNK_SIZE)
        states = functools.partial(
            qla.fused_gdr_h, k=k, v=v, a=a, g=g, b=beta, initial_state=None,
            output_final_state=True, output_h=False,
        )  # fmt: skip
        if not cut.split:
            if not shard.goes_on:
                return ShardMap(None, None), (g, a, *[None] * 5)
            _, finals, transitions = states(cu_seqlens=cut.last, num_warmup_chunks=cut.last_chunks)
            transition = transitions[0].float() if shard.through else None
            return ShardMap(finals[0].float(), transition), (g, a, *[None] * 5)

        warm, warm_back, falls_back, falls_back_back = qla.get_warmup_chunks_bidi(
            g=g, cu_seqlens=cut.parts, ht_mask_fwd=cut.no_final, ht_mask_bwd=cut.no_start,
            chunk_size=qla.CHUNK_SIZE, seq_map_r2c=cut.of_fragment,
        )  # fmt: skip
        if cut.ragged and shard.goes_on:
            # FlashQLA counts warm-up chunks backwards from a part's end, which must then be a chunk's end.
            warm[-1:].fill_(cut.ragged)
            falls_back[-1:].fill_(True)
        _, finals, transitions = states(cu_seqlens=cut.parts, num_warmup_chunks=warm)
        shard_map = ShardMap(None, None)
        if shard.goes_on:
            of_last = slice(-cut.of_last, None)
            state, transition = composed(finals[of_last], transitions[of_last], falls_back[of_last])
            shard_map = ShardMap(state, transition if shard.through else None)
        saved = (g, a, finals, transitions, falls_back, warm_back, falls_back_back)
        return shard_map, saved

    def output(
        self,
        shard: Shard,
        inputs: tuple[torch.Tensor, ...],
        saved: Saved,
        entering: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Saved]:
        """As :meth:`.ShardKernels.output`."""
        from flash_qla.ops.gated_delta_rule import chunk as qla

        q, k, v, _, beta = (x[None] for x in inputs)
        g, a, finals, transitions, falls_back, warm_back, falls_back_back = saved
        cut = _parts(shard, v.shape[2], v.device)
        states = start_states(shard, entering, empty_state(inputs))
        if cut.split:
            states = qla.correct_initial_states(
                raw_h0=states, ht_buffer=finals, mt_buffer=transitions, fallback_mask=falls_back,
                seq_map_r2c=cut.of_fragment,
            )  # fmt: skip
        output, _, _ = qla.fused_gdr_fwd(
            q=q, k=k, v=v, a=a, g=g, b=beta, scale=_scale(k), initial_state=states,
            output_final_state=False, output_h=False, output_o=True, cu_seqlens=cut.parts,
            cp_seq_map=cut.of_part, raw_cu_seqlens=cut.fragments,
        )  # fmt: skip
        return output[0].to(q.dtype), (g, a, states, transitions, warm_back, falls_back_back)

    def entering_gradient(
        self, shard: Shard, inputs: tuple[torch.Tensor, ...], saved: Saved, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, Saved]:
        """As :meth:`.ShardKernels.entering_gradient`."""
        from flash_qla.ops.gated_delta_rule import chunk as qla

        q, k, v, _, beta = (x[None] for x in inputs)
        g, a, _, transitions, warm_back, falls_back_back = saved
        cut = _parts(shard, v.shape[2], v.device)
        if not cut.split and not shard.begun:
            return None, (None,)
        _, by_states = qla.fused_gdr_dh(
            q=q, k=k, a=a, g=g, b=beta, do=grad[None], dht=None, output_dh0=True, output_dh=False,
            scale=_scale(k), cu_seqlens=cut.parts if cut.split else cut.first,
            num_warmup_chunks=warm_back if cut.split else cut.first_chunks,
        )  # fmt: skip
        by_state = None
        if shard.begun and cut.split:
            assert transitions is not None and falls_back_back is not None
            # From right to left, with the adjoint of every part's map.
            adjoint = transitions[: cut.of_first].transpose(-1, -2).flip(0)
            back = falls_back_back[: cut.of_first].flip(0)
            by_state, _ = composed(by_states[: cut.of_first].flip(0), adjoint, back)
        elif shard.begun:
            by_state = by_states[0]
        return by_state, (by_states,)

    def gradients(
        self,
        shard: Shard,
        inputs: tuple[torch.Tensor, ...],
        saved: Saved,
        partial: Saved,
        grad: torch.Tensor,
        leaving: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """As :meth:`.ShardKernels.gradients`."""
        from flash_qla.ops.gated_delta_rule import chunk as qla
        from flash_qla.ops.utils import chunk_local_cumsum

        q, k, v, _, beta = (x[None] for x in inputs)
        g, a, states, transitions, _, falls_back_back = saved
        cut = _parts(shard, v.shape[2], v.device)
        by_finals = final_gradients(shard, leaving, empty_state(inputs))
        if cut.split:
            by_finals = qla.correct_terminal_states(
                raw_dht=by_finals, dht_buffer=partial[0], mt_buffer=transitions,
                fallback_mask=falls_back_back, seq_map_r2c=cut.of_fragment,
            )  # fmt: skip
        h, _, _ = qla.fused_gdr_h(
            k=k, v=v, a=a, g=g, b=beta, initial_state=states, output_final_state=False,
            output_h=True, cu_seqlens=cut.parts,
        )  # fmt: skip
        dq, dk, dv, dg, dbeta, _ = qla.fused_gdr_bwd(
            q=q, k=k, v=v, a=a, g=g, b=beta, do=grad[None], dht=by_finals, h=h, scale=_scale(k),
            cu_seqlens=cut.parts,
        )  # fmt: skip
        dg = chunk_local_cumsum(
            dg, chunk_size=qla.CHUNK_SIZE, reverse=True, cu_seqlens=cut.fragments,
            zero_last_chunk=True,
        )  # fmt: skip
        return as_inputs((dq, dk, dv, dg, dbeta), inputs)


def composed(
    states: torch.Tensor, transitions: torch.Tensor, remembered: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One map of states from the maps of successive parts, in fp32, by products of neighbours.

    Args:
        states: ``[P, H, d, dv]``, each part's final state from a zero state.
        transitions: ``[P, H, d, d]``.
        remembered: ``[P, H]`` bool; false: the part has forgotten the entering state, and its transition is not
            read.

    Returns:
        State ``[H, d, dv]`` and transition ``[H, d, d]``.
    """
    known = remembered[..., None, None]
    m = torch.where(known, transitions.float(), torch.zeros((), device=states.device))
    b = states.float()
    while len(b) > 1:
        pairs = len(b) // 2 * 2
        first, second = m[0:pairs:2], m[1:pairs:2]
        joined = torch.matmul(second, torch.cat((b[0:pairs:2], first), dim=-1))
        by_state, product = joined.split((b.shape[-1], m.shape[-1]), dim=-1)
        b = torch.cat((b[1:pairs:2] + by_state, b[pairs:]))
        m = torch.cat((product, m[pairs:]))
    return b[0], m[0]


def _scale(k: torch.Tensor) -> float:
    return k.shape[-1] ** -0.5
