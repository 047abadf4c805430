"""Triton kernels of the short convolution; twin: :func:`megatron_hydra.ops.short_conv.short_conv`.

A program has a block of channels and loops over blocks of tokens. The W shifted reads of a block come from the
cache, so every tensor is read from device memory once. Sums are fp32. Kernels are at most eight tokens wide.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_hydra.ops.integers import cdiv

TOKENS, CHANNELS, WARPS = 32, 128, 4
BACKWARD_TOKENS, BACKWARD_CHANNELS = 4, 256
"""One warp has whole rows of channels, so that one thread computes each sum over tokens."""
MAX_BLOCKS = 64
"""Largest number of token blocks of a backward program: each program writes a partial weight gradient."""


@triton.jit
def _shifted(x, halo, index, columns, x_t, halo_t, allowed, inside, W, HAS_HALO: tl.constexpr):
    """Rows ``index`` of x: negative ones from the halo, and zero if not ``allowed``."""
    ok = (allowed & (index >= 0))[:, None] & inside[None, :]
    value = tl.load(x + (index * x_t)[:, None] + columns[None, :], ok, 0.0).to(tl.float32)
    if HAS_HALO:
        before = (allowed & (index < 0))[:, None] & inside[None, :]
        rows = halo + ((index + W - 1) * halo_t)[:, None] + columns[None, :]
        value += tl.load(rows, before, 0.0).to(tl.float32)
    return value


@triton.jit
def _tap(weight, c, w_c, inside, back: tl.constexpr, W: tl.constexpr):
    """The weight of the token ``back`` tokens before; 0 if the kernel is narrower."""
    if back < W:
        return tl.load(weight + c * w_c + (W - 1 - back), inside, 0.0).to(tl.float32)
    else:
        return tl.zeros([c.shape[0]], tl.float32)


@triton.jit
def _forward_kernel(
    x, weight, positions, halo, y, rest, length, channels, split, x_t, w_c, halo_t,
    W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HAS_HALO: tl.constexpr,
    HAS_REST: tl.constexpr,
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
    y_t = split
    if HAS_REST:  # noqa: SIM102  (known when compiled; a block lies in one of the two)
        if tl.program_id(0) * CHANNELS >= split:
            y, y_t = rest - split, channels - split
    out = y + (t * y_t)[:, None] + c[None, :]
    tl.store(out, total.to(y.dtype.element_ty), valid[:, None] & inside[None, :])


@triton.jit
def _backward_kernel(  # noqa: C901, PLR0915  (Triton has no arrays of accumulators)
    x, weight, positions, dy, d_rest, dx, dw, length, channels, split, x_t, w_c, dy_t, rest_t, blocks,
    W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HAS_REST: tl.constexpr,
):  # fmt: skip
    """Outputs t … t+W−1 read token t: with all their gradients loaded, dx and dw read x once."""
    if HAS_REST:  # noqa: SIM102
        if tl.program_id(0) * CHANNELS >= split:
            dy, dy_t = d_rest - split, rest_t
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    zero = tl.zeros([CHANNELS], tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    # Read before the loop: the compiler cannot know that the loop does not write these.
    w0 = _tap(weight, c, w_c, inside, 0, W)
    w1 = _tap(weight, c, w_c, inside, 1, W)
    w2 = _tap(weight, c, w_c, inside, 2, W)
    w3 = _tap(weight, c, w_c, inside, 3, W)
    w4 = _tap(weight, c, w_c, inside, 4, W)
    w5 = _tap(weight, c, w_c, inside, 5, W)
    w6 = _tap(weight, c, w_c, inside, 6, W)
    w7 = _tap(weight, c, w_c, inside, 7, W)
    for block in range(blocks):
        t = (tl.program_id(1).to(tl.int64) * blocks + block) * TOKENS + tl.arange(0, TOKENS)
        here = (t < length)[:, None] & inside[None, :]
        value = tl.load(x + (t * x_t)[:, None] + c[None, :], here, 0.0).to(tl.float32)
        total = tl.zeros([TOKENS, CHANNELS], tl.float32)
        for back in tl.static_range(W):
            later = t + back
            reads = (later < length) & (tl.load(positions + later, later < length, 0) >= back)
            grad = tl.load(
                dy + (later * dy_t)[:, None] + c[None, :], reads[:, None] & inside[None, :], 0.0
            ).to(tl.float32)
            part = tl.sum(grad * value, 0)
            if back == 0:
                s0 += part
                total += grad * w0[None, :]
            if back == 1:
                s1 += part
                total += grad * w1[None, :]
            if back == 2:
                s2 += part
                total += grad * w2[None, :]
            if back == 3:
                s3 += part
                total += grad * w3[None, :]
            if back == 4:
                s4 += part
                total += grad * w4[None, :]
            if back == 5:
                s5 += part
                total += grad * w5[None, :]
            if back == 6:
                s6 += part
                total += grad * w6[None, :]
            if back == 7:
                s7 += part
                total += grad * w7[None, :]
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
    """Gradients by the W−1 tokens before the stream, and their part of the weight's gradient (fp32). They are a
    few rows, which torch computes.
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


def conv_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    halo: torch.Tensor | None,
    split: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The convolution of all channels in one launch.

    Args:
        x, weight, positions, halo: as of the twin, channels contiguous.
        split: number of channels of the first result; the second has the others. ``None``: the first has all.

    Returns:
        ``[T, split]`` and ``[T, C − split]``.
    """
    length, channels = x.shape
    split = channels if split is None else split
    y = torch.empty(length, split, dtype=x.dtype, device=x.device)
    rest = None if split == channels else x.new_empty(length, channels - split)
    block = CHANNELS if rest is None else math.gcd(CHANNELS, split)
    _forward_kernel[(cdiv(channels, block), cdiv(length, TOKENS))](
        x, weight, positions, halo, y, rest, length, channels, split, x.stride(0),
        weight.stride(0), 0 if halo is None else halo.stride(0), W=weight.shape[1],
        TOKENS=TOKENS, CHANNELS=block, HAS_HALO=halo is not None, HAS_REST=rest is not None,
        num_warps=WARPS,
    )  # fmt: skip
    return y, rest


def conv_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    halo: torch.Tensor | None,
    dy: torch.Tensor,
    d_rest: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients by x, weight and halo, from those by the results of :func:`conv_forward`."""
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    if d_rest is not None and d_rest.stride(-1) != 1:
        d_rest = d_rest.contiguous()
    (length, channels), width = x.shape, weight.shape[1]
    blocks = min(MAX_BLOCKS, max(1, length // (BACKWARD_TOKENS * 512)))
    programs = cdiv(length, BACKWARD_TOKENS * blocks)
    dx = torch.empty(length, channels, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, channels, width, dtype=torch.float32, device=x.device)
    block = BACKWARD_CHANNELS
    if d_rest is not None:
        block = math.gcd(block, dy.shape[1])
    _backward_kernel[(cdiv(channels, block), programs)](
        x, weight, positions, dy, d_rest, dx, partial, length, channels, dy.shape[1], x.stride(0),
        weight.stride(0), dy.stride(0), 0 if d_rest is None else d_rest.stride(0), blocks, W=width,
        TOKENS=BACKWARD_TOKENS, CHANNELS=block, HAS_REST=d_rest is not None,
        num_warps=1,
    )  # fmt: skip
    dw = partial.sum(0)
    d_halo = None
    if halo is not None:
        rows = width - 1
        first = dy if d_rest is None else torch.cat((dy[:rows], d_rest[:rows]), dim=1)
        d_halo, by_halo = _halo_gradients(first, weight, positions, halo)
        dw += by_halo
    return dx, dw.to(weight.dtype), d_halo


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
        ctx.save_for_backward(x, weight, positions, halo)
        return conv_forward(x, weight, positions, halo)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, positions, halo = ctx.saved_tensors
        dx, dw, d_halo = conv_backward(x, weight, positions, halo, dy)
        return dx, dw, None, d_halo


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
