"""From projections to the inputs of both branches' kernels: norm, rotary, scale, l2 (design §2).

Queries and keys of a branch have the same steps, each of which is optional. On a GPU one Triton kernel does
them in one pass (:mod:`megatron_hydra.ops.triton_qk_preparation`). The functions here are its torch twin and
the CPU path.
"""

from __future__ import annotations

import torch

L2_EPS = 1e-6
"""Added to the sum of squares of q and k before the inverse square root."""


def rms_norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """X / RMS(x) over the last axis, computed in fp32 (fp64 for fp64), times ``weight`` if given.

    The weight multiplies after the cast back to ``x``'s dtype, as Hugging Face's Qwen3 does.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else normed * weight


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x [T, n, d]`` by tables ``[T, 1, d]``; computed in the wider of the two dtypes."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


def l2_norm(x: torch.Tensor) -> torch.Tensor:
    """X / ‖x‖ over the last axis, in fp32 (fp64 for fp64)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)


def prepare_heads(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    scale: torch.Tensor | None,
    l2: bool,
) -> torch.Tensor:
    """l2(s_t · R_t N(x)) with the requested steps.

    Args:
        x: ``[T, n, d]`` queries or keys; any strides with contiguous channels.
        norm_weight: ``[d]`` of the RMSNorm over d, or ``None`` for no norm.
        eps: its epsilon.
        tables: cos and sin, fp32 ``[T, 1, d]`` with repeated halves (``model.rotary``), or ``None``.
        scale: fp32 ``[T]``, the log scale of queries, or ``None``.
        l2: end with unit norm.

    Returns:
        ``[T, n, d]`` in ``x``'s dtype.
    """
    if norm_weight is not None:
        x = rms_norm(x, eps, norm_weight)
    if tables is not None:
        x = apply_rotary(x, *tables)
    if scale is not None:
        x = (x * scale[:, None, None]).to(x.dtype)
    return l2_norm(x) if l2 else x


def prepare_queries_and_keys(
    x: torch.Tensor,
    key_heads: int,
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    eps: float,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    scale: torch.Tensor | None,
    l2: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`prepare_heads` of queries and of the keys behind them; only queries are scaled.

    Args:
        x: ``[T, n + m, d]``; any strides with contiguous channels.
        key_heads: m, at least one.
        norms: ``[d]`` weights of the norms of queries and of keys, both or neither.
        eps, tables, scale, l2: as of :func:`prepare_heads`.

    Returns:
        ``[T, n, d]`` and ``[T, m, d]`` in ``x``'s dtype.
    """
    q, k = x.split((x.shape[1] - key_heads, key_heads), dim=1)
    return (
        prepare_heads(q, norms[0], eps, tables, scale, l2),
        prepare_heads(k, norms[1], eps, tables, None, l2),
    )
