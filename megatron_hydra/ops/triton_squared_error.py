"""Triton kernel of ``align``'s loss; twin: :func:`megatron_hydra.ops.squared_error.squared_error`.

It reads output and target once and writes the gradient once. torch's operators move ten times as much memory
and need about fifteen launches per layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_hydra.ops.integers import cdiv, next_power_of_2

ROWS, MAX_BLOCK, WARPS = 4, 1024, 4


@triton.jit
def _squared_error_kernel(
    output, target, mask, losses, gradient, tokens, o_t, t_t, D,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    counts = tl.load(mask + t, t < tokens, 0) != 0
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = (t < tokens)[:, None] & (c < D)[None, :]
        read = inside & counts[:, None]
        a = tl.load(output + (t * o_t)[:, None] + c[None, :], read, 0.0).to(tl.float32)
        b = tl.load(target + (t * t_t)[:, None] + c[None, :], read, 0.0).to(tl.float32)
        gap = a - b
        total += tl.sum(gap * gap, 1)
        slope = (gap * (2.0 / D)).to(gradient.dtype.element_ty)
        tl.store(gradient + (t * D)[:, None] + c[None, :], slope, inside)
    tl.store(losses + t, total / D, t < tokens)


def squared_error(
    output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token's mean squared difference ``[T]`` in fp32 (0 if masked), and the gradient of their sum.

    Args:
        output, target, mask: as of the twin.
    """
    output, target = (x if x.stride(1) == 1 else x.contiguous() for x in (output, target))
    tokens, channels = output.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=output.device)
    gradient = torch.empty(tokens, channels, dtype=output.dtype, device=output.device)
    _squared_error_kernel[(cdiv(tokens, ROWS),)](
        output, target, mask.contiguous().view(torch.uint8), losses, gradient, tokens,
        output.stride(0), target.stride(0), channels,
        BLOCK=min(MAX_BLOCK, next_power_of_2(channels)), ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
    return losses, gradient
