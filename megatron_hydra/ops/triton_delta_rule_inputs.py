"""The inputs of the delta rule by two launches each way; twin:
:func:`megatron_hydra.ops.delta_rule_inputs.delta_rule_inputs`.

Separately, the three convolutions and the two preparations are ten launches and five autograd nodes per layer.
On a small model, they take the host longer than the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_hydra.ops.delta_rule_inputs import Norms
from megatron_hydra.ops.triton_qk_preparation import (
    prepare_backward,
    prepare_forward,
    prepare_heads,
    tables_of,
)
from megatron_hydra.ops.triton_short_conv import conv_backward, conv_forward


class _DeltaRuleInputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        heads: tuple[int, int],
        conv: torch.Tensor,
        positions: torch.Tensor,
        halo: torch.Tensor | None,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n, m = heads
        d = qkv.shape[1] // (n + 2 * m)
        convolved, v = conv_forward(qkv, conv, positions, halo, (n + m) * d)
        assert v is not None
        convolved = convolved.view(-1, n + m, d)
        q, k = prepare_forward(convolved, (q_norm, k_norm), tables_of(cos, sin), None, eps, True, m)
        assert k is not None
        ctx.save_for_backward(qkv, conv, positions, halo, convolved, q_norm, k_norm, cos, sin)
        ctx.eps = eps
        return q, k, v.view(-1, m, d)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        qkv, conv, positions, halo, convolved, q_norm, k_norm, cos, sin = ctx.saved_tensors
        d_convolved, (d_q_norm, d_k_norm) = prepare_backward(
            convolved, (q_norm, k_norm), tables_of(cos, sin), None, ctx.eps, True, dq, dk
        )
        d_qkv, d_conv, d_halo = conv_backward(
            qkv, conv, positions, halo, d_convolved.flatten(1), dv.flatten(1)
        )
        return d_qkv, None, d_conv, None, d_halo, d_q_norm, d_k_norm, None, None, None


def delta_rule_inputs(
    qkv: torch.Tensor,
    heads: tuple[int, int],
    conv: torch.Tensor | None,
    positions: torch.Tensor,
    halo: torch.Tensor | None,
    norms: Norms,
    eps: float,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`megatron_hydra.ops.delta_rule_inputs.delta_rule_inputs`."""
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    if conv is None:
        d = qkv.shape[1] // (heads[0] + 2 * heads[1])
        q, k, v = (
            x.unflatten(-1, (-1, d)) for x in qkv.split([n * d for n in (*heads, heads[1])], 1)
        )
        q, k = (
            prepare_heads(x, norm, eps, tables, None, True)
            for x, norm in zip((q, k), norms, strict=True)
        )
        return q, k, v
    conv = conv if conv.stride(-1) == 1 else conv.contiguous()
    if halo is not None:
        halo = halo.to(qkv.dtype)
        halo = halo if halo.stride(-1) == 1 else halo.contiguous()
    cos, sin = tables or (None, None)
    q, k, v = _DeltaRuleInputs.apply(qkv, heads, conv, positions, halo, *norms, eps, cos, sin)
    return q, k, v
