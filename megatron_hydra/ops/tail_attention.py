"""Causal attention of a document's last queries, by dense kernels that know no such mask.

The queries of a context-parallel rank are the last ones of the keys that they see. cuDNN's kernel in torch, the
fastest one on Hopper, aligns the diagonal of a causal mask with the first key. So the keys are cut where the
queries begin. All queries see all earlier keys (a product without a mask), and the other keys form a causal
square. The log-sum-exps ℓ₁, ℓ₂ of the two parts join them: ℓ = log(e^ℓ₁ + e^ℓ₂), o = e^(ℓ₁−ℓ)·o₁ + e^(ℓ₂−ℓ)·o₂,
as in ring attention (Liu et al., arXiv 2310.01889). In the backward, a kernel that is given the joined o and ℓ
returns its own part of the gradients.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Protocol

import torch

from megatron_hydra.ops.differences import first_difference
from megatron_hydra.ops.varlen_attention import varlen_attention

_log = logging.getLogger(__name__)

LEAST_PAIRS = 2**32
"""Queries × keys from which the two dense products are used. cuDNN plans every new shape for some hundred
milliseconds; documents of 64K tokens and more do not bring many shapes, and take longer than that."""

LARGEST_HEAD = 128
"""cuDNN computes the backward of larger heads on some cards only."""

TOLERANCE = 3e-2
"""Largest ‖got − twin‖ / ‖twin‖ in bf16 of an output or a gradient, as in the start-up check."""

_PROBED_TOKENS = (192, 448)
"""Queries and keys of :func:`what_is_wrong`."""


class DenseKernel(Protocol):
    """Attention of one document that also returns log-sum-exps. All tensors are ``[1, heads, tokens, d]``."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """The output, the natural log-sum-exps ``[1, n, Tq]`` in fp32, and what ``backward`` needs besides."""

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        kept: Any,
        is_causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients by q, k and v for this output and these log-sum-exps."""


class CudnnKernel:
    """cuDNN's attention, through torch."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """See :class:`DenseKernel`."""
        out, lse, *kept = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, is_causal, False
        )
        # cum_seq_q, cum_seq_k, max_q, max_k, seed, offset; the last is a mask for debugging.
        return out, lse.reshape(out.shape[:3]), (*kept[:6], lse.shape)

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        kept: Any,
        is_causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :class:`DenseKernel`."""
        cum_q, cum_k, max_q, max_k, seed, offset, shape = kept
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse.reshape(shape), seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0,
            is_causal,
        )  # fmt: skip
        return grads


class CpuKernel:
    """Flash attention of torch for the CPU: the same construction, to be tested without a GPU."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """See :class:`DenseKernel`."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal
        )
        return out, lse, None

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        kept: Any,
        is_causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :class:`DenseKernel`."""
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, is_causal
        )
        return grads


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: DenseKernel
    ) -> torch.Tensor:
        past = k.shape[2] - q.shape[2]
        out_1, lse_1, kept_1 = kernel.forward(q, k[:, :, :past], v[:, :, :past], False)
        out_2, lse_2, kept_2 = kernel.forward(q, k[:, :, past:], v[:, :, past:], True)
        share = torch.sigmoid(lse_2 - lse_1).unsqueeze(-1)  # e^(ℓ₂ − ℓ)
        out = torch.lerp(out_1.float(), out_2.float(), share).to(out_1.dtype)
        ctx.save_for_backward(q, k, v, out, torch.logaddexp(lse_1, lse_2))
        ctx.kernel, ctx.past, ctx.kept = kernel, past, (kept_1, kept_2)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        past, (kept_1, kept_2) = ctx.past, ctx.kept
        dq_1, dk_1, dv_1 = ctx.kernel.backward(
            grad, q, k[:, :, :past], v[:, :, :past], out, lse, kept_1, False
        )
        dq_2, dk_2, dv_2 = ctx.kernel.backward(
            grad, q, k[:, :, past:], v[:, :, past:], out, lse, kept_2, True
        )
        return dq_1 + dq_2, torch.cat((dk_1, dk_2), 2), torch.cat((dv_1, dv_2), 2), None


def tail_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: DenseKernel
) -> torch.Tensor:
    """softmax(q kᵀ/√d) v of one document, causal, the last query aligned with the last key.

    The reference is :func:`~megatron_hydra.ops.varlen_attention.varlen_attention`.

    Args:
        q: ``[Tq, n, d]``.
        k, v: ``[Tk, g, d]`` with Tk > Tq and g dividing n.
        kernel: computes the two parts.

    Returns:
        ``[Tq, n, d]`` in ``q``'s dtype.
    """
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out: torch.Tensor = _Tail.apply(q, k, v, kernel)
    return out.squeeze(0).transpose(0, 1)


def what_is_wrong(kernel: DenseKernel, device: torch.device, head_dim: int = 128) -> str | None:
    """Compare :func:`tail_attention` with its reference on ``device`` in bf16.

    Returns:
        What differs or was raised; ``None`` if output and gradients are right.
    """
    queries, keys = _PROBED_TOKENS
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(tokens, heads, head_dim, generator=generator).to(device, torch.bfloat16)
        for tokens, heads in ((queries, 4), (keys, 2), (keys, 2))
    ]
    cotangent = torch.randn(queries, 4, head_dim, generator=generator).to(device, torch.bfloat16)
    mine = [x.clone().requires_grad_() for x in inputs]
    twin = [x.float().requires_grad_() for x in inputs]
    try:
        got = tail_attention(mine[0], mine[1], mine[2], kernel)
        got_grads = torch.autograd.grad(got, mine, cotangent)
    except Exception as error:
        return f"it raised {type(error).__name__}: {str(error)[:300]}"
    want = varlen_attention(twin[0], twin[1], twin[2], (0, queries), (0, keys))
    want_grads = torch.autograd.grad(want, twin, cotangent.float())
    names = ("the output", "the gradient of q", "the gradient of k", "the gradient of v")
    pairs = zip((got, *got_grads), (want, *want_grads), strict=True)
    return first_difference(dict(zip(names, pairs, strict=True)), TOLERANCE)


@functools.cache
def cudnn_kernel() -> CudnnKernel | None:
    """The kernel of cuDNN, if it is right on the current GPU; otherwise a warning says why not.

    The first call compares it with its reference. It may come within ``no_grad``, from a forward that will be
    recomputed.
    """
    kernel = CudnnKernel()
    with torch.inference_mode(False), torch.enable_grad():
        why = what_is_wrong(kernel, torch.device("cuda"))
    if why is None:
        return kernel
    _log.warning(
        "cuDNN cannot compute the attention of a document's last queries here (%s): the kernel of packed "
        "documents does, more slowly",
        why,
    )
    return None


def is_suited(queries: int, keys: int, head_dim: int) -> bool:
    """Whether cuDNN takes these heads, and whether the product is large enough (:data:`LEAST_PAIRS`)."""
    cudnn_takes = head_dim % 8 == 0 and head_dim <= LARGEST_HEAD
    return cudnn_takes and queries < keys and queries * keys >= LEAST_PAIRS


def suits(q: torch.Tensor, k: torch.Tensor) -> bool:
    """See :func:`is_suited`.

    Args:
        q: ``[Tq, n, d]``.
        k: ``[Tk, g, d]``.
    """
    in_16_bits = q.dtype in (torch.bfloat16, torch.float16)
    return in_16_bits and is_suited(q.shape[0], k.shape[0], q.shape[-1])
