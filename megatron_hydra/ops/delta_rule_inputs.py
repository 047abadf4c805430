"""From the projections of a GDN branch to the q, k, v of its recurrence: convolution, norm, rotary, l2.

On a GPU two Triton kernels compute them, one over all channels and one over the heads of q and k
(:mod:`megatron_hydra.ops.triton_delta_rule_inputs`). This module is their torch twin, the CPU path.
"""

from __future__ import annotations

import torch

from megatron_hydra.ops.qk_preparation import prepare_heads
from megatron_hydra.ops.short_conv import short_conv

Norms = tuple[torch.Tensor | None, torch.Tensor | None]


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
    """Q = l2(R_t N_q(conv(q))), likewise k, and v = conv(v).

    Args:
        qkv: ``[T, (n + 2m)·d]``, the heads of q, of k and of v one after the other; any strides with
            contiguous channels.
        heads: n and m.
        conv: ``[(n + 2m)·d, W]`` kernels of the short convolution, or ``None`` for none.
        positions, halo: as of :func:`~megatron_hydra.ops.short_conv.short_conv`.
        norms: ``[d]`` weights of the norms of q and of k, both or neither.
        eps: their epsilon.
        tables: cos and sin, fp32 ``[T, 1, d]``, or ``None`` for no rotary embedding.

    Returns:
        q ``[T, n, d]``, k and v ``[T, m, d]``.
    """
    d = qkv.shape[1] // (heads[0] + 2 * heads[1])
    sizes = [n * d for n in (*heads, heads[1])]
    parts = qkv.split(sizes, dim=1)
    if conv is not None:
        halos = (None, None, None) if halo is None else halo.split(sizes, dim=1)
        parts = tuple(
            short_conv(x, kernel, positions, before)
            for x, kernel, before in zip(parts, conv.split(sizes), halos, strict=True)
        )
    q, k, v = (x.unflatten(-1, (-1, d)) for x in parts)
    q, k = (
        prepare_heads(x, norm, eps, tables, None, True)
        for x, norm in zip((q, k), norms, strict=True)
    )
    return q, k, v
