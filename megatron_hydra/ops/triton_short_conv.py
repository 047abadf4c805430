"""Triton kernels of the short convolution; twin: :func:`megatron_hydra.ops.short_conv.short_conv`.

A program owns a block of channels and walks over blocks of tokens. The W shifted reads of a block
come from the cache, so device memory sees every tensor once. Sums are fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

TOKENS, CHANNELS, WARPS = 32, 128, 4
MAX_BLOCKS = 16
"""Token blocks of one backward program at most: each program leaves a partial weight gradient."""


@triton.jit
def _shifted(x, halo, index, columns, x_t, halo_t, allowed, inside, W, HAS_HALO: tl.constexpr):
    """Rows ``index`` of x, taken from the halo where negative and zero where not ``allowed``."""
    ok = (allowed & (index >= 0))[:, None] & inside[None, :]
    value = tl.load(x + (index * x_t)[:, None] + columns[None, :], ok, 0.0).to(tl.float32)
    if HAS_HALO:
        before = (allowed & (index < 0))[:, None] & inside[None, :]
        rows = halo + ((index + W - 1) * halo_t)[:, None] + columns[None, :]
        value += tl.load(rows, before, 0.0).to(tl.float32)
    return value


@triton.jit
def _forward_kernel(
    x, weight, positions, halo, y, length, channels, x_t, w_c, halo_t,
    W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HAS_HALO: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid, inside = t < length, c < channels
    position = tl.load(positions + t, valid, 0)
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for back in tl.static_range(W):
        tap = tl.load(weight + c * w_c + (W - 1 - back), inside, 0.0).to(tl.float32)
        allowed = valid & (position >= back)
        value = _shifted(x, halo, t - back, c, x_t, halo_t, allowed, inside, W, HAS_HALO)
        total += value * tap[None, :]
    out = y + (t * channels)[:, None] + c[None, :]
    tl.store(out, total.to(y.dtype.element_ty), valid[:, None] & inside[None, :])


@triton.jit
def _backward_kernel(
    x, weight, positions, halo, dy, dx, dw, length, channels, x_t, w_c, halo_t, dy_t, blocks,
    W: tl.constexpr, WP: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    HAS_HALO: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    sums = tl.zeros([WP, CHANNELS], tl.float32)
    for block in range(blocks):
        first = (tl.program_id(1).to(tl.int64) * blocks + block) * TOKENS
        t = first + tl.arange(0, TOKENS)
        valid = t < length
        position = tl.load(positions + t, valid, 0)
        here = valid[:, None] & inside[None, :]
        grad = tl.load(dy + (t * dy_t)[:, None] + c[None, :], here, 0.0).to(tl.float32)
        total = tl.zeros([TOKENS, CHANNELS], tl.float32)
        for back in tl.static_range(W):
            tap = tl.load(weight + c * w_c + (W - 1 - back), inside, 0.0).to(tl.float32)
            allowed = valid & (position >= back)
            value = _shifted(x, halo, t - back, c, x_t, halo_t, allowed, inside, W, HAS_HALO)
            mine = (tl.arange(0, WP) == W - 1 - back)[:, None]
            sums += tl.where(mine, tl.sum(grad * value, 0)[None, :], 0.0)
            later = t + back
            reads = (later < length) & (tl.load(positions + later, later < length, 0) >= back)
            ahead = tl.load(
                dy + (later * dy_t)[:, None] + c[None, :], reads[:, None] & inside[None, :], 0.0
            )
            total += ahead.to(tl.float32) * tap[None, :]
        tl.store(dx + (t * channels)[:, None] + c[None, :], total.to(dx.dtype.element_ty), here)
    tap_index = tl.arange(0, WP)
    partial = dw + (tl.program_id(1) * channels + c)[None, :] * W + tap_index[:, None]
    tl.store(partial, sums, (tap_index < W)[:, None] & inside[None, :])


def _halo_gradient(
    dy: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, halo: torch.Tensor
) -> torch.Tensor:
    """Gradient by the W−1 tokens before the stream: a handful of rows, left to torch."""
    width = weight.shape[1]
    grad = torch.zeros(halo.shape, dtype=torch.float32, device=dy.device)
    for back in range(1, width):
        rows = min(back, dy.shape[0])
        first = dy[:rows].float().masked_fill((positions[:rows] < back)[:, None], 0.0)
        at = width - 1 - back
        grad[at : at + rows] += first * weight[:, width - 1 - back].float()
    return grad.to(halo.dtype)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        positions: torch.Tensor,
        halo: torch.Tensor | None,
    ) -> torch.Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        length, channels = x.shape
        y = torch.empty(length, channels, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(channels, CHANNELS), triton.cdiv(length, TOKENS))
        _forward_kernel[grid](
            x, weight, positions, halo, y, length, channels, x.stride(0), weight.stride(0),
            0 if halo is None else halo.stride(0), W=weight.shape[1],
            TOKENS=TOKENS, CHANNELS=CHANNELS, HAS_HALO=halo is not None, num_warps=WARPS,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, positions, halo)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, positions, halo = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        (length, channels), width = x.shape, weight.shape[1]
        blocks = min(MAX_BLOCKS, max(1, length // 16384))
        programs = triton.cdiv(length, TOKENS * blocks)
        dx = torch.empty(length, channels, dtype=x.dtype, device=x.device)
        partial = torch.empty(programs, channels, width, dtype=torch.float32, device=x.device)
        _backward_kernel[(triton.cdiv(channels, CHANNELS), programs)](
            x, weight, positions, halo, dy, dx, partial, length, channels, x.stride(0),
            weight.stride(0), 0 if halo is None else halo.stride(0), dy.stride(0), blocks,
            W=width, WP=triton.next_power_of_2(width), TOKENS=TOKENS, CHANNELS=CHANNELS,
            HAS_HALO=halo is not None, num_warps=WARPS,
        )  # fmt: skip
        d_halo = None if halo is None else _halo_gradient(dy, weight, positions, halo)
        return dx, partial.sum(0).to(weight.dtype), None, d_halo


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    initial: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`megatron_hydra.ops.short_conv.short_conv`, reading and writing memory once."""
    if initial is not None:
        initial = initial.to(x.dtype)
        initial = initial if initial.stride(-1) == 1 else initial.contiguous()
    output: torch.Tensor = _ShortConv.apply(x, weight, positions, initial)
    return output
