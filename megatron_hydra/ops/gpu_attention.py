"""Full-attention kernels of GPUs, with the signature of their torch twin ``varlen_attention``.

No kernel here repeats the keys of grouped queries, uses a mask, or reads boundaries from the device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_hydra.ops import tail_attention
from megatron_hydra.ops.determinism import is_deterministic
from megatron_hydra.ops.device_cache import int_tensor
from megatron_hydra.ops.varlen_attention import varlen_attention

Boundaries = tuple[int, ...]
Attention = Callable[..., torch.Tensor]
"""As ``varlen_attention``, with its ``window``."""

DENSE_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
"""In order of preference: cuDNN's kernel uses Hopper's instructions; torch's flash attention does not."""

DETERMINISTIC_KERNELS = [SDPBackend.FLASH_ATTENTION]
"""Kernels with a backward without atomics, which torch takes in deterministic runs."""


def _lengths(cu: Boundaries) -> list[int]:
    return [b - a for a, b in zip(cu, cu[1:], strict=False)]


def is_uniform(cu_q: Boundaries, cu_k: Boundaries) -> bool:
    """Whether the stream is a dense batch: all documents have one length, and every query has its own key."""
    return cu_q == cu_k and len(set(_lengths(cu_q))) == 1


def sdpa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: Boundaries,
    cu_k: Boundaries,
    kernels: Sequence[SDPBackend] | None = None,
) -> torch.Tensor:
    """Torch's SDPA (cuDNN, else flash) on documents of equal length; see ``varlen_attention``.

    Args:
        kernels: SDPA's candidates, the preferred one first; ``None``: all known ones.

    Raises:
        ValueError: documents of different lengths, or queries that are a document's tail.
    """
    if not is_uniform(cu_q, cu_k):
        raise ValueError("sdpa_attention takes documents of one length, every query with its key")
    if kernels is None:
        kernels = DETERMINISTIC_KERNELS if is_deterministic() else DENSE_KERNELS
    batch = len(cu_q) - 1
    q4, k4, v4 = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(list(kernels), set_priority=True):
        out = F.scaled_dot_product_attention(
            q4, k4, v4, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2).flatten(0, 1)


def torch_varlen() -> Attention:
    """Torch's ``varlen_attn`` (flash attention over packed documents).

    Raises:
        ImportError: this torch does not have it (2.10 was the first).
    """
    from torch.nn.attention.varlen import varlen_attn

    # The API is new: later releases have causality in the window instead of a flag.
    known = inspect.signature(varlen_attn).parameters
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}

    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: Boundaries,
        cu_k: Boundaries,
        window: int | None = None,
    ) -> torch.Tensor:
        if "is_causal" not in known:
            causal: dict[str, Any] = {"window_size": (_left(window), 0)}
        elif window is None:
            causal = {"is_causal": True}
        else:  # this release has no windows
            return varlen_attention(q, k, v, cu_q, cu_k, window)
        boundaries = device_boundaries(cu_q, cu_k, q.device)
        output: torch.Tensor = varlen_attn(q, k, v, *boundaries, **causal, **grouped)  # type: ignore
        return output

    return attention


def flash_attn_varlen() -> Attention:
    """flash-attn's ``flash_attn_varlen_func``: version 3 for Hopper if installed, else version 2.

    Raises:
        ImportError: neither is installed.
    """
    try:
        from flash_attn_interface import flash_attn_varlen_func
    except ImportError:
        from flash_attn import flash_attn_varlen_func

    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: Boundaries,
        cu_k: Boundaries,
        window: int | None = None,
    ) -> torch.Tensor:
        boundaries = device_boundaries(cu_q, cu_k, q.device)
        out = flash_attn_varlen_func(
            q,
            k,
            v,
            *boundaries,
            causal=True,
            deterministic=is_deterministic(),
            window_size=(_left(window), -1 if window is None else 0),
        )
        return out[0] if isinstance(out, tuple) else out

    return attention


def transformer_engine_varlen() -> Attention:
    """Transformer Engine's ``DotProductAttention``, which chooses between cuDNN and flash-attn itself.

    Raises:
        ImportError: it is not installed.
    """
    from transformer_engine.pytorch import DotProductAttention

    @functools.cache
    def module(heads: int, groups: int, d: int) -> Callable[..., torch.Tensor]:
        # It has no parameters, so layers of equal shape share it.
        return DotProductAttention(
            heads,
            d,
            num_gqa_groups=groups,
            qkv_format="thd",
            # Bottom right: the last query of a document is aligned with its last key.
            attn_mask_type="padding_causal_bottom_right",
        )

    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: Boundaries,
        cu_k: Boundaries,
        window: int | None = None,
    ) -> torch.Tensor:
        starts_q, starts_k, longest_q, longest_k = device_boundaries(cu_q, cu_k, q.device)
        out = module(q.shape[1], k.shape[1], q.shape[2])(
            q,
            k,
            v,
            cu_seqlens_q=starts_q,
            cu_seqlens_kv=starts_k,
            max_seqlen_q=longest_q,
            max_seqlen_kv=longest_k,
            window_size=(_left(window), 0),
        )
        return out.view(q.shape)  # it joins the heads

    return attention


def dense_or_packed(
    dense: Attention,
    packed: Attention,
    tail: Callable[[], tail_attention.DenseKernel | None] | None = None,
) -> Attention:
    """A kernel that takes ``dense`` for a dense batch (such as one document) without a window, and ``packed``
    otherwise.

    Args:
        dense, packed: kernels.
        tail: returns the kernel that computes the last queries of one long document
            (:func:`~megatron_hydra.ops.tail_attention.tail_attention`). It is called when the first such block
            comes. ``None``, also as its result: ``packed`` computes them.
    """

    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: Boundaries,
        cu_k: Boundaries,
        window: int | None = None,
    ) -> torch.Tensor:
        if window is None and is_uniform(cu_q, cu_k):
            return dense(q, k, v, cu_q, cu_k)
        # cuDNN's backward adds in no fixed order.
        is_tail = window is None and len(cu_q) == 2 and not is_deterministic()
        if tail is not None and is_tail and tail_attention.suits(q, k):
            kernel = tail()
            if kernel is not None:
                return tail_attention.tail_attention(q, k, v, kernel)
        return packed(q, k, v, cu_q, cu_k, window)

    return attention


def _left(window: int | None) -> int:
    """Number of keys left of a query's own, as in flash attention; −1: all."""
    return -1 if window is None else window - 1


def device_boundaries(
    cu_q: Boundaries, cu_k: Boundaries, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Arguments of varlen kernels: int32 boundaries on the device, the longest lengths on the host."""
    return (
        int_tensor(cu_q, torch.int32, device),
        int_tensor(cu_k, torch.int32, device),
        max(_lengths(cu_q)),
        max(_lengths(cu_k)),
    )
