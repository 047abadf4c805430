"""A context-parallel shard's steps by FLA's Triton kernels (:class:`.sharded_delta_rule.ShardKernels`).

They are the kernels of runs without context parallelism, in the order of ``fla/ops/gated_delta_rule/chunk.py``,
so no more kernels are compiled and tuned. The map is two runs of the kernel that computes only states, over the
fragment that continues in the next shard: from a zero state, and from the identity with new values of zero. The
entering gradient is a run of this kernel's backward over the fragment that began in an earlier shard.
"""

from __future__ import annotations

import functools

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

CHUNK = 64
"""Tokens of a chunk; FLA's default."""


@functools.lru_cache(maxsize=64)
def _chunks(cu_seqlens: tuple[int, ...], device: torch.device) -> dict[str, torch.Tensor]:
    """Boundaries of fragments and their chunks, as arguments of FLA's kernels."""
    pairs = [
        (fragment, chunk)
        for fragment, (a, b) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False))
        for chunk in range(-(-(b - a) // CHUNK))
    ]
    flat = tuple(x for pair in pairs for x in pair)
    return {
        "cu_seqlens": int_tensor(cu_seqlens, torch.int64, device),
        "chunk_indices": int_tensor(flat, torch.int64, device).view(-1, 2),
    }


def _first(shard: Shard) -> tuple[int, ...]:
    return shard.cu_seqlens[:2]


def _last(shard: Shard) -> tuple[int, ...]:
    return shard.cu_seqlens[-2:]


class FlaShardKernels:
    """FLA's Triton kernels; bf16 or fp16 inputs, fp32 gates and states."""

    def shard_map(self, shard: Shard, inputs: tuple[torch.Tensor, ...]) -> tuple[ShardMap, Saved]:
        """As :meth:`.ShardKernels.shard_map`."""
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
        from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
        from fla.ops.utils import chunk_local_cumsum
        from fla.ops.utils.constant import RCP_LN2

        _, k, v, log_alpha, beta = (x[None] for x in inputs)
        chunks = _chunks(shard.cu_seqlens, k.device)
        g = chunk_local_cumsum(log_alpha, chunk_size=CHUNK, scale=RCP_LN2, **chunks)
        w, u, a = chunk_gated_delta_rule_fwd_intra(
            k=k, v=v, g=g, beta=beta, chunk_size=CHUNK, **chunks
        )

        def final_state(start: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            _, _, final = chunk_gated_delta_rule_fwd_h(
                k=k, w=w, u=values, g=g, initial_state=start[None], output_final_state=True,
                chunk_size=CHUNK, **_chunks(_last(shard), k.device),
            )  # fmt: skip
            return final[0]

        state = transition = None
        if shard.goes_on:
            heads, d = k.shape[2:]
            state = final_state(torch.zeros_like(empty_state(inputs)), u)
            if shard.through:
                identity = torch.eye(d, dtype=torch.float32, device=k.device)
                transition = final_state(
                    identity.expand(heads, -1, -1).contiguous(), torch.zeros_like(w)
                )
        return ShardMap(state, transition), (g, a, w, u)

    def output(
        self,
        shard: Shard,
        inputs: tuple[torch.Tensor, ...],
        saved: Saved,
        entering: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Saved]:
        """As :meth:`.ShardKernels.output`."""
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
        from fla.ops.common.chunk_o import chunk_fwd_o

        q, k = (x[None] for x in inputs[:2])
        g, a, w, u = saved
        assert u is not None
        chunks = _chunks(shard.cu_seqlens, k.device)
        states = start_states(shard, entering, empty_state(inputs))
        h, values, _ = chunk_gated_delta_rule_fwd_h(
            k=k, w=w, u=u, g=g, initial_state=states, output_final_state=True,
            chunk_size=CHUNK, **chunks,
        )  # fmt: skip
        output = chunk_fwd_o(
            q=q, k=k, v=values, h=h, g=g, scale=_scale(k), chunk_size=CHUNK, **chunks
        )
        return output[0].to(q.dtype), (g, a, states)

    def entering_gradient(
        self, shard: Shard, inputs: tuple[torch.Tensor, ...], saved: Saved, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, Saved]:
        """As :meth:`.ShardKernels.entering_gradient`; keeps tensors that step 4 also needs."""
        from fla.ops.common.chunk_delta_h import (
            chunk_gated_delta_rule_bwd_dhu,
            chunk_gated_delta_rule_fwd_h,
        )
        from fla.ops.common.chunk_o import chunk_bwd_dv_local
        from fla.ops.gated_delta_rule.wy_fast import recompute_w_u_fwd

        q, k, v, _, beta = (x[None] for x in inputs)
        g, a, states = saved
        chunks = _chunks(shard.cu_seqlens, k.device)
        w, u = recompute_w_u_fwd(k=k, v=v, beta=beta, A=a, g=g, **chunks)
        h, values, _ = chunk_gated_delta_rule_fwd_h(
            k=k, w=w, u=u, g=g, initial_state=states, output_final_state=True,
            chunk_size=CHUNK, **chunks,
        )  # fmt: skip
        by_values = chunk_bwd_dv_local(
            q=q, k=k, g=g, do=grad[None], scale=_scale(k), chunk_size=CHUNK, **chunks
        )
        by_state = None
        if shard.begun:
            zero = torch.zeros_like(empty_state(inputs))[None]
            _, by_states, _ = chunk_gated_delta_rule_bwd_dhu(
                q=q, k=k, w=w, do=grad[None], dv=by_values, g=g, h0=zero, dht=zero, scale=_scale(k),
                chunk_size=CHUNK, **_chunks(_first(shard), k.device),
            )  # fmt: skip
            by_state = by_states[0]
        return by_state, (w, h, values, by_values)

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
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu
        from fla.ops.common.chunk_o import chunk_bwd_dqkwg
        from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd
        from fla.ops.utils import chunk_local_cumsum

        q, k, v, _, beta = (x[None] for x in inputs)
        g, a, states = saved
        w, h, values, by_values = partial
        chunks = _chunks(shard.cu_seqlens, k.device)
        dh, _, du = chunk_gated_delta_rule_bwd_dhu(
            q=q, k=k, w=w, do=grad[None], dv=by_values, g=g, h0=states,
            dht=final_gradients(shard, leaving, empty_state(inputs)), scale=_scale(k),
            chunk_size=CHUNK, **chunks,
        )  # fmt: skip
        dq, dk, dw, dg = chunk_bwd_dqkwg(
            q=q, k=k, v=values, w=w, g=g, h=h, dv=du, do=grad[None], dh=dh, scale=_scale(k),
            chunk_size=CHUNK, **chunks,
        )  # fmt: skip
        dk_more, dv, dbeta, dg_more = prepare_wy_repr_bwd(
            k=k, v=v, beta=beta, g=g, A=a, dw=dw, du=du, **chunks
        )
        dg = chunk_local_cumsum(dg.add_(dg_more), chunk_size=CHUNK, reverse=True, **chunks)
        return as_inputs((dq, dk.add_(dk_more), dv, dg, dbeta), inputs)


def _scale(k: torch.Tensor) -> float:
    return k.shape[-1] ** -0.5
