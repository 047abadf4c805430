"""The end of both branches: output gate, per-head RMSNorm, per-head scale (design §2, fusion).

On a GPU a Triton kernel does this in one pass over each branch's output and writes directly into o_proj's input
(:mod:`megatron_hydra.ops.triton_fusion_tail`). This module is its torch twin, the CPU path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Branch = tuple[torch.Tensor, torch.Tensor | None]
"""A branch's head outputs ``[T, n, d]`` and the gate logits of the same shape, or ``None``."""


def fusion_tail(
    branches: Sequence[Branch], scale: torch.Tensor | None, eps: float | None
) -> torch.Tensor:
    """scale_h · RMSNorm(o_h ⊙ 2σ(gate_h)) of all heads, the branches' heads one after the other.

    Args:
        branches: head outputs and gates, at least one. Zero gate logits multiply by exactly 1.
        scale: ``[N]`` (γ) or ``[T, N]`` (gated competition) over the heads of all branches, or
            ``None``.
        eps: epsilon of the norm over d (in fp32, without a weight), or ``None`` for no norm.

    Returns:
        ``[T, N·d]`` in the outputs' dtype: what the output projection reads.
    """
    if has_no_step(branches, scale, eps):
        return branches[0][0].flatten(1)
    joined, start = [], 0
    for o, gate in branches:
        end = start + o.shape[1]
        part = None if scale is None else scale[..., start:end]
        joined.append(_fused(o, gate, part, eps).flatten(1))
        start = end
    return joined[0] if len(joined) == 1 else torch.cat(joined, dim=1)


def has_no_step(branches: Sequence[Branch], scale: torch.Tensor | None, eps: float | None) -> bool:
    """Whether the tail computes and joins nothing, as in a dense model."""
    return len(branches) == 1 and branches[0][1] is None and scale is None and eps is None


def _fused(
    o: torch.Tensor, gate: torch.Tensor | None, scale: torch.Tensor | None, eps: float | None
) -> torch.Tensor:
    wide = o if o.dtype == torch.float64 else o.float()
    if gate is not None:
        wide = wide * (2.0 * torch.sigmoid(gate.to(wide.dtype)))
    if eps is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if scale is not None:
        wide = wide * scale.to(wide.dtype)[..., None]
    return wide.to(o.dtype)
