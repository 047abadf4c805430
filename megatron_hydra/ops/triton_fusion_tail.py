"""Triton kernels of the fusion tail; twin: :func:`megatron_hydra.ops.fusion_tail.fusion_tail`.

A row is one head of one token; a program has the same head of neighbouring tokens. The forward
reads o and the gate once and writes o_proj's input once; the backward recomputes the norm from
them, reads the incoming gradient once and writes both gradients once. Everything between load and
store is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_hydra.ops.fusion_tail import Branch, has_no_step
from megatron_hydra.ops.integers import cdiv, next_power_of_2

ROWS, WARPS = 16, 4
"""Rows of a program and its warps: 32 bytes of each tensor per thread at d = 128 in bf16."""


@triton.jit
def _rows(program, tokens, heads, ROWS: tl.constexpr):
    """Tokens and head of this program: it needs one division, while rows of mixed heads would need many."""
    t = (program // heads).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return t, program % heads, t < tokens


# Not specialized: one kernel serves any numbers of tokens and heads, and it may exchange those of heads.
@triton.jit(do_not_specialize=["tokens", "heads", "rest_heads"])
def _forward_kernel(
    o, gate, scale, y, o_rest, gate_rest, tokens, heads, rest_heads, eps,
    o_t, o_h, g_t, g_h, o_rest_t, o_rest_h, g_rest_t, g_rest_h, s_t, s_h, y_t,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if HAS_REST:
        first = tl.cdiv(tokens, ROWS) * heads
        if program >= first:
            program -= first
            y += heads * D
            if HAS_SCALE:
                scale += heads * s_h
            if HAS_GATE:
                gate, g_t, g_h = gate_rest, g_rest_t, g_rest_h
            o, o_t, o_h, heads = o_rest, o_rest_t, o_rest_h, rest_heads
    t, h, valid = _rows(program, tokens, heads, ROWS)
    c = tl.arange(0, BLOCK)
    mask = valid[:, None] & (c < D)[None, :]
    x = tl.load(o + (t * o_t + h * o_h)[:, None] + c[None, :], mask, 0.0).to(tl.float32)
    if HAS_GATE:
        g = tl.load(gate + (t * g_t + h * g_h)[:, None] + c[None, :], mask, 0.0).to(tl.float32)
        x = x * (2.0 * tl.sigmoid(g))
    if HAS_NORM:
        x = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    if HAS_SCALE:
        x = x * tl.load(scale + t * s_t + h * s_h, valid, 0.0).to(tl.float32)[:, None]
    out = y + (t * y_t + h * D)[:, None] + c[None, :]
    tl.store(out, x.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["tokens", "heads", "rest_heads"])
def _backward_kernel(
    o, gate, scale, dy, d_o, d_gate, d_scale, o_rest, gate_rest, d_o_rest, d_gate_rest,
    tokens, heads, rest_heads, eps,
    o_t, o_h, g_t, g_h, o_rest_t, o_rest_h, g_rest_t, g_rest_h, s_t, s_h, dy_t, ds_t,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if HAS_REST:
        first = tl.cdiv(tokens, ROWS) * heads
        if program >= first:
            program -= first
            dy += heads * D
            if HAS_SCALE:
                scale += heads * s_h
                d_scale += heads
            if HAS_GATE:
                gate, g_t, g_h, d_gate = gate_rest, g_rest_t, g_rest_h, d_gate_rest
            o, o_t, o_h, d_o, heads = o_rest, o_rest_t, o_rest_h, d_o_rest, rest_heads
    t, h, valid = _rows(program, tokens, heads, ROWS)
    c = tl.arange(0, BLOCK)
    mask = valid[:, None] & (c < D)[None, :]
    x = tl.load(o + (t * o_t + h * o_h)[:, None] + c[None, :], mask, 0.0).to(tl.float32)
    grad = tl.load(dy + (t * dy_t + h * D)[:, None] + c[None, :], mask, 0.0).to(tl.float32)
    gated = x
    if HAS_GATE:
        g = tl.load(gate + (t * g_t + h * g_h)[:, None] + c[None, :], mask, 0.0).to(tl.float32)
        sigma = tl.sigmoid(g)
        gated = x * (2.0 * sigma)
    normed = gated
    if HAS_NORM:
        rstd = tl.rsqrt(tl.sum(gated * gated, 1) / D + eps)
        normed = gated * rstd[:, None]
    if HAS_SCALE:
        tl.store(d_scale + t * ds_t + h, tl.sum(grad * normed, 1), valid)
        grad = grad * tl.load(scale + t * s_t + h * s_h, valid, 0.0).to(tl.float32)[:, None]
    if HAS_NORM:
        grad = rstd[:, None] * (grad - normed * (tl.sum(grad * normed, 1) / D)[:, None])
    own = ((t * heads + h) * D)[:, None] + c[None, :]
    if HAS_GATE:
        d_g = grad * x * (2.0 * sigma * (1.0 - sigma))
        tl.store(d_gate + own, d_g.to(d_gate.dtype.element_ty), mask)
        grad = grad * (2.0 * sigma)
    tl.store(d_o + own, grad.to(d_o.dtype.element_ty), mask)


def _channels_contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _strides(x: torch.Tensor | None) -> tuple[int, int]:
    """Strides of the token and head axes; for a per-head scale ``[N]`` the first is 0."""
    if x is None:
        return 0, 0
    return (0, x.stride(0)) if x.dim() == 1 else (x.stride(0), x.stride(1))


Tensors = list[torch.Tensor | None]


def _launches(tensors: Tensors) -> list[tuple[int, list[torch.Tensor], Tensors]]:
    """Each launch as (first head, outputs, gates): two branches share a launch if both have a gate or none."""
    outputs = [x for x in tensors[::2] if x is not None]
    gates = tensors[1::2]
    launches, start, i = [], 0, 0
    while i < len(outputs):
        alike = i + 1 < len(outputs) and (gates[i] is None) == (gates[i + 1] is None)
        count = 2 if alike else 1
        launches.append((start, outputs[i : i + count], gates[i : i + count]))
        start += sum(o.shape[1] for o in outputs[i : i + count])
        i += count
    return launches


def _arguments(
    outputs: list[torch.Tensor], gates: Tensors
) -> tuple[torch.Tensor | None, torch.Tensor | None, int, tuple[int, ...]]:
    """The second branch's output and gate, its heads, and the strides of both branches."""
    rest = outputs[1] if len(outputs) == 2 else None
    gate_rest = gates[1] if len(outputs) == 2 else None
    strides = (*_strides(outputs[0]), *_strides(gates[0]), *_strides(rest), *_strides(gate_rest))
    return rest, gate_rest, 0 if rest is None else rest.shape[1], strides


class _FusionTail(torch.autograd.Function):
    """Forward and backward over all branches; inputs are scale, eps, then o, gate of each branch."""

    @staticmethod
    def forward(
        ctx: Any, scale: torch.Tensor | None, eps: float | None, *flat: torch.Tensor | None
    ) -> torch.Tensor:
        tensors = [_channels_contiguous(x) for x in flat]
        launches = _launches(tensors)
        tokens, _, d = launches[0][1][0].shape
        y = launches[0][1][0].new_empty(
            tokens, sum(o.shape[1] for _, os, _ in launches for o in os) * d
        )
        for start, outputs, gates in launches:
            o, n = outputs[0], outputs[0].shape[1]
            rest, gate_rest, rest_heads, strides = _arguments(outputs, gates)
            part = None if scale is None else scale[..., start : start + n + rest_heads]
            _forward_kernel[(cdiv(tokens, ROWS) * (n + rest_heads),)](
                o, gates[0], part, y[:, start * d :], rest, gate_rest, tokens, n, rest_heads,
                eps or 0.0, *strides, *_strides(part), y.stride(0),
                D=d, BLOCK=next_power_of_2(d), ROWS=ROWS, num_warps=WARPS,
                HAS_GATE=gates[0] is not None, HAS_SCALE=part is not None, HAS_NORM=eps is not None,
                HAS_REST=rest is not None,
            )  # fmt: skip
        ctx.save_for_backward(scale, *tensors)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, *tensors = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        tokens, heads = dy.shape[0], sum(o.shape[1] for o in tensors[::2])
        # One number for each head of every token; for a per-head scale torch sums over the tokens.
        d_scale = None if scale is None else dy.new_empty(tokens, heads, dtype=torch.float32)
        grads: Tensors = [
            None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for x in tensors
        ]
        done = 0
        for start, outputs, gates in _launches(tensors):
            o, (n, d) = outputs[0], outputs[0].shape[1:]
            rest, gate_rest, rest_heads, strides = _arguments(outputs, gates)
            part = None if scale is None else scale[..., start : start + n + rest_heads]
            d_o, d_gate, *d_rest = grads[done : done + 2 * len(outputs)]
            done += 2 * len(outputs)
            _backward_kernel[(cdiv(tokens, ROWS) * (n + rest_heads),)](
                o, gates[0], part, dy[:, start * d :], d_o, d_gate,
                None if d_scale is None else d_scale[:, start:], rest, gate_rest,
                *(d_rest or (None, None)), tokens, n, rest_heads, ctx.eps or 0.0,
                *strides, *_strides(part), dy.stride(0), heads,
                D=d, BLOCK=next_power_of_2(d), ROWS=ROWS, num_warps=WARPS,
                HAS_GATE=gates[0] is not None, HAS_SCALE=part is not None,
                HAS_NORM=ctx.eps is not None, HAS_REST=rest is not None,
            )  # fmt: skip
        if scale is not None and d_scale is not None:
            d_scale = (d_scale if scale.dim() == 2 else d_scale.sum(0)).to(scale.dtype)
        return d_scale, None, *grads


def fusion_tail(
    branches: Sequence[Branch], scale: torch.Tensor | None, eps: float | None
) -> torch.Tensor:
    """As :func:`megatron_hydra.ops.fusion_tail.fusion_tail`, in one pass over every branch."""
    if has_no_step(branches, scale, eps):
        return branches[0][0].flatten(1)
    flat = [tensor for branch in branches for tensor in branch]
    output: torch.Tensor = _FusionTail.apply(scale, eps, *flat)
    return output
