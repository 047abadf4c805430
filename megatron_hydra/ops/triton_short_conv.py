"""Triton kernels of the short convolution; twin: :func:`megatron_hydra.ops.short_conv.short_conv`.

A program owns a block of channels and walks over blocks of tokens. The W shifted reads of a block
come from the cache, so device memory sees every tensor once. Sums are fp32. Kernels are at
most eight tokens wide.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

TOKENS, CHANNELS, WARPS = 32, 128, 4
BACKWARD_TOKENS, BACKWARD_CHANNELS = 4, 256
"""One warp has whole rows of channels, so that sums over tokens stay inside a thread."""
MAX_BLOCKS = 64
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
def _backward_kernel(  # noqa: C901  (Triton has no arrays of accumulators)
    x, weight, positions, dy, dx, dw, length, channels, x_t, w_c, dy_t, blocks,
    W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Token t feeds outputs t … t+W−1: with their gradients at hand, dx and dw need x once."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    zero = tl.zeros([CHANNELS], tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    for block in range(blocks):
        t = (tl.program_id(1).to(tl.int64) * blocks + block) * TOKENS + tl.arange(0, TOKENS)
        here = (t < length)[:, None] & inside[None, :]
        value = tl.load(x + (t * x_t)[:, None] + c[None, :], here, 0.0).to(tl.float32)
        total = tl.zeros([TOKENS, CHANNELS], tl.float32)
        for back in tl.static_range(W):
            tap = tl.load(weight + c * w_c + (W - 1 - back), inside, 0.0).to(tl.float32)
            later = t + back
            reads = (later < length) & (tl.load(positions + later, later < length, 0) >= back)
            grad = tl.load(
                dy + (later * dy_t)[:, None] + c[None, :], reads[:, None] & inside[None, :], 0.0
            ).to(tl.float32)
            total += grad * tap[None, :]
            part = tl.sum(grad * value, 0)
            if back == 0:
                s0 += part
            if back == 1:
                s1 += part
            if back == 2:
                s2 += part
            if back == 3:
                s3 += part
            if back == 4:
                s4 += part
            if back == 5:
                s5 += part
            if back == 6:
                s6 += part
            if back == 7:
                s7 += part
        tl.store(dx + (t * channels)[:, None] + c[None, :], total.to(dx.dtype.element_ty), here)
    partial = dw + (tl.program_id(1) * channels + c) * W + W - 1
    tl.store(partial, s0, inside)
    if W > 1:
        tl.store(partial - 1, s1, inside)
    if W > 2:
        tl.store(partial - 2, s2, inside)
    if W > 3:
        tl.store(partial - 3, s3, inside)
    if W > 4:
        tl.store(partial - 4, s4, inside)
    if W > 5:
        tl.store(partial - 5, s5, inside)
    if W > 6:
        tl.store(partial - 6, s6, inside)
    if W > 7:
        tl.store(partial - 7, s7, inside)


def _halo_gradients(
    dy: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, halo: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by the W−1 tokens before the stream, and theirs by the weight (fp32): a handful of
    rows, left to torch.
    """
    width = weight.shape[1]
    by_halo = torch.zeros(halo.shape, dtype=torch.float32, device=dy.device)
    by_weight = torch.zeros(weight.shape, dtype=torch.float32, device=dy.device)
    for back in range(1, width):
        rows = min(back, dy.shape[0])
        first = dy[:rows].float().masked_fill((positions[:rows] < back)[:, None], 0.0)
        at = width - 1 - back
        by_halo[at : at + rows] += first * weight[:, at].float()
        by_weight[:, at] += (first * halo[at : at + rows].float()).sum(0)
    return by_halo.to(halo.dtype), by_weight


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
        blocks = min(MAX_BLOCKS, max(1, length // (BACKWARD_TOKENS * 512)))
        programs = triton.cdiv(length, BACKWARD_TOKENS * blocks)
        dx = torch.empty(length, channels, dtype=x.dtype, device=x.device)
        partial = torch.empty(programs, channels, width, dtype=torch.float32, device=x.device)
        _backward_kernel[(triton.cdiv(channels, BACKWARD_CHANNELS), programs)](
            x, weight, positions, dy, dx, partial, length, channels, x.stride(0), weight.stride(0),
            dy.stride(0), blocks, W=width, TOKENS=BACKWARD_TOKENS, CHANNELS=BACKWARD_CHANNELS,
            num_warps=1,
        )  # fmt: skip
        dw = partial.sum(0)
        d_halo = None
        if halo is not None:
            d_halo, by_halo = _halo_gradients(dy, weight, positions, halo)
            dw += by_halo
        return dx, dw.to(weight.dtype), None, d_halo


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
