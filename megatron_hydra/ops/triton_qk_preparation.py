"""Triton kernels of q/k preparation; twin: :func:`megatron_hydra.ops.qk_preparation.prepare_heads`.

A row is one head of one token, held as its two rotary halves. A program loops over the heads of a block of
tokens and keeps the block's rotary tables: reading them again for every head would be more cache traffic than
the heads themselves. The forward reads and writes a row once; the backward recomputes every step from the
input. Everything in between is fp32 (the twin rounds after every step, as Hugging Face's models do).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_hydra.ops.integers import cdiv, next_power_of_2
from megatron_hydra.ops.qk_preparation import L2_EPS

ROWS, WARPS = 16, 4
PROGRAMS_PER_UNIT = 8
"""Programs per multiprocessor that are enough to fill it; a backward program sums the norm weight's
gradient over all its rows."""


@triton.jit
def _prepared(
    x1, x2, w1, w2, cos, sin, s, eps, l2_eps,
    D: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROTARY: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_L2: tl.constexpr,
):  # fmt: skip
    """The steps in fp32; returns the result's halves and the values that the backward needs."""
    rstd = tl.zeros([x1.shape[0]], tl.float32) + 1.0
    if HAS_NORM:
        rstd = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)
        z1, z2 = x1 * rstd[:, None] * w1[None, :], x2 * rstd[:, None] * w2[None, :]
    else:
        z1, z2 = x1, x2
    if HAS_ROTARY:
        r1, r2 = z1 * cos - z2 * sin, z2 * cos + z1 * sin
    else:
        r1, r2 = z1, z2
    if HAS_SCALE:
        r1, r2 = r1 * s[:, None], r2 * s[:, None]
    length = tl.zeros([x1.shape[0]], tl.float32) + 1.0
    if HAS_L2:
        length = tl.rsqrt(tl.sum(r1 * r1, 1) + tl.sum(r2 * r2, 1) + l2_eps)
        r1, r2 = r1 * length[:, None], r2 * length[:, None]
    return r1, r2, rstd, length


# Not specialized: one kernel serves any numbers of tokens and heads, and it may exchange those of heads.
@triton.jit(do_not_specialize=["tokens", "heads", "rest_heads"])
def _forward_kernel(
    x, weight, cos_table, sin_table, scale, y, rest_weight, y_rest, tokens, heads, rest_heads,
    x_t, x_h, table_t, eps, l2_eps, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROTARY: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_L2: tl.constexpr, HAS_REST: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    if HAS_REST:  # noqa: SIM102  (known when compiled; half of the programs have the rest)
        if tl.program_id(2) == 1:
            x += heads.to(tl.int64) * x_h
            y, heads = y_rest, rest_heads
            if HAS_NORM:
                weight = rest_weight
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    mask = (t < tokens)[:, None] & (c < HALF)[None, :]
    w1, w2, cos, sin, s = 0.0, 0.0, 0.0, 0.0, 0.0
    if HAS_NORM:
        w1 = tl.load(weight + c, c < HALF, 0.0).to(tl.float32)
        w2 = tl.load(weight + HALF + c, c < HALF, 0.0).to(tl.float32)
    if HAS_ROTARY:
        cos = tl.load(cos_table + (t * table_t)[:, None] + c[None, :], mask, 0.0)
        sin = tl.load(sin_table + (t * table_t)[:, None] + c[None, :], mask, 0.0)
    if HAS_SCALE:
        s = tl.load(scale + t, t < tokens, 0.0)
        if HAS_REST:
            s = tl.where(tl.program_id(2) == 1, 1.0, s)
    reads = x + (t * x_t)[:, None] + c[None, :]
    writes = y + (t * heads * D)[:, None] + c[None, :]
    for h in range(tl.program_id(1), heads, tl.num_programs(1)):
        x1 = tl.load(reads + h * x_h, mask, 0.0).to(tl.float32)
        x2 = tl.load(reads + h * x_h + HALF, mask, 0.0).to(tl.float32)
        y1, y2, _, _ = _prepared(
            x1, x2, w1, w2, cos, sin, s, eps, l2_eps, D, HAS_NORM, HAS_ROTARY, HAS_SCALE, HAS_L2
        )
        tl.store(writes + h * D, y1.to(y.dtype.element_ty), mask)
        tl.store(writes + h * D + HALF, y2.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["tokens", "heads", "rest_heads"])
def _backward_kernel(  # noqa: PLR0915
    x, weight, cos_table, sin_table, scale, dy, dx, dw, rest_weight, dy_rest, tokens, heads,
    rest_heads, x_t, x_h, dx_t, table_t, eps,
    l2_eps, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROTARY: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_L2: tl.constexpr, HAS_REST: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    if HAS_REST:  # noqa: SIM102
        if tl.program_id(2) == 1:
            x += heads.to(tl.int64) * x_h
            dx += heads * D
            dy, heads = dy_rest, rest_heads
            if HAS_NORM:
                weight = rest_weight
                dw += tl.num_programs(0) * tl.num_programs(1) * D
    c = tl.arange(0, BLOCK)
    inside = c < HALF
    # One sum over the rows at the end, because it uses shared memory.
    sum1 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum2 = tl.zeros([ROWS, BLOCK], tl.float32)
    w1, w2 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if HAS_NORM:
        w1 = tl.load(weight + c, inside, 0.0).to(tl.float32)
        w2 = tl.load(weight + HALF + c, inside, 0.0).to(tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        t = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (t < tokens)[:, None] & inside[None, :]
        # Set within the loop: a variable that a loop carries may not change its shape.
        cos, sin, s = 0.0, 0.0, tl.zeros([ROWS], tl.float32)
        if HAS_ROTARY:
            cos = tl.load(cos_table + (t * table_t)[:, None] + c[None, :], mask, 0.0)
            sin = tl.load(sin_table + (t * table_t)[:, None] + c[None, :], mask, 0.0)
        if HAS_SCALE:
            s = tl.load(scale + t, t < tokens, 0.0)
            if HAS_REST:
                s = tl.where(tl.program_id(2) == 1, 1.0, s)
        reads = x + (t * x_t)[:, None] + c[None, :]
        own = (t * heads * D)[:, None] + c[None, :]
        writes = dx + (t * dx_t)[:, None] + c[None, :]
        for h in range(tl.program_id(1), heads, tl.num_programs(1)):
            x1 = tl.load(reads + h * x_h, mask, 0.0).to(tl.float32)
            x2 = tl.load(reads + h * x_h + HALF, mask, 0.0).to(tl.float32)
            g1 = tl.load(dy + own + h * D, mask, 0.0).to(tl.float32)
            g2 = tl.load(dy + own + h * D + HALF, mask, 0.0).to(tl.float32)
            y1, y2, rstd, length = _prepared(
                x1, x2, w1, w2, cos, sin, s, eps, l2_eps, D, HAS_NORM, HAS_ROTARY, HAS_SCALE,
                HAS_L2,
            )  # fmt: skip
            if HAS_L2:
                along = tl.sum(g1 * y1, 1) + tl.sum(g2 * y2, 1)
                g1 = length[:, None] * (g1 - y1 * along[:, None])
                g2 = length[:, None] * (g2 - y2 * along[:, None])
            if HAS_SCALE:
                g1, g2 = g1 * s[:, None], g2 * s[:, None]
            if HAS_ROTARY:
                g1, g2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
            if HAS_NORM:
                n1, n2 = x1 * rstd[:, None], x2 * rstd[:, None]
                sum1 += g1 * n1
                sum2 += g2 * n2
                g1, g2 = g1 * w1[None, :], g2 * w2[None, :]
                mean = (tl.sum(g1 * n1, 1) + tl.sum(g2 * n2, 1)) / D
                g1 = rstd[:, None] * (g1 - n1 * mean[:, None])
                g2 = rstd[:, None] * (g2 - n2 * mean[:, None])
            tl.store(writes + h * D, g1.to(dx.dtype.element_ty), mask)
            tl.store(writes + h * D + HALF, g2.to(dx.dtype.element_ty), mask)
    if HAS_NORM:
        partial = dw + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * D + c
        tl.store(partial, tl.sum(sum1, 0), inside)
        tl.store(partial + HALF, tl.sum(sum2, 0), inside)


def _settings(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    scale: torch.Tensor | None,
    l2: bool,
) -> dict[str, Any]:
    return {
        "D": x.shape[2],
        "BLOCK": next_power_of_2(x.shape[2] // 2),
        "ROWS": ROWS,
        "HAS_NORM": weight is not None,
        "HAS_ROTARY": tables is not None,
        "HAS_SCALE": scale is not None,
        "HAS_L2": l2,
        "num_warps": WARPS,
    }


Tables = tuple[torch.Tensor, torch.Tensor] | None
Pair = tuple[torch.Tensor | None, torch.Tensor | None]


def _launch(
    x: torch.Tensor, tables: Tables, scale: torch.Tensor | None, rest_heads: int
) -> tuple[int, int, tuple[Any, ...]]:
    """Blocks of tokens, programs that share the heads of a block, and the strides of x and the tables."""
    tokens, heads = x.shape[:2]
    blocks = cdiv(tokens, ROWS)
    groups = _head_groups(blocks, max(heads - rest_heads, rest_heads), x.device)
    return blocks, groups, (x.stride(0), x.stride(1), 0 if tables is None else tables[0].stride(0))


def prepare_forward(
    x: torch.Tensor,
    weights: Pair,
    tables: Tables,
    scale: torch.Tensor | None,
    eps: float,
    l2: bool,
    rest_heads: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The chain for heads of one or two kinds in one launch.

    Args:
        x: ``[T, n, d]``, channels contiguous; the last ``rest_heads`` heads are of the second kind.
        weights: of the norm for each kind, ``None`` for no norm.
        tables, eps, l2: as of the twin.
        scale: as of the twin, for heads of the first kind only.

    Returns:
        ``[T, n − rest_heads, d]`` and ``[T, rest_heads, d]``, contiguous.
    """
    tokens, heads, d = x.shape
    heads -= rest_heads
    y = torch.empty(tokens, heads, d, dtype=x.dtype, device=x.device)
    rest = x.new_empty(tokens, rest_heads, d) if rest_heads else None
    blocks, groups, (x_t, x_h, table_t) = _launch(x, tables, scale, rest_heads)
    cos, sin = tables or (None, None)
    _forward_kernel[(blocks, groups, 1 if rest is None else 2)](
        x, weights[0], cos, sin, scale, y, weights[1], rest, tokens, heads, rest_heads, x_t, x_h,
        table_t, eps, L2_EPS, **_settings(x, weights[0], tables, scale, l2), HAS_REST=rest is not None,
    )  # fmt: skip
    return y, rest


def prepare_backward(
    x: torch.Tensor,
    weights: Pair,
    tables: Tables,
    scale: torch.Tensor | None,
    eps: float,
    l2: bool,
    dy: torch.Tensor,
    d_rest: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Pair]:
    """Gradients by x ``[T, n, d]`` and by the weights, from those by the results."""
    dy, d_rest = dy.contiguous(), None if d_rest is None else d_rest.contiguous()
    tokens, heads, d = x.shape
    rest_heads = 0 if d_rest is None else d_rest.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks, groups, (x_t, x_h, table_t) = _launch(x, tables, scale, rest_heads)
    programs = min(blocks, PROGRAMS_PER_UNIT * _units(x.device))
    kinds = 1 if d_rest is None else 2
    partial = None
    if weights[0] is not None:
        partial = x.new_empty(kinds, programs * groups, d, dtype=torch.float32)
    cos, sin = tables or (None, None)
    _backward_kernel[(programs, groups, kinds)](
        x, weights[0], cos, sin, scale, dy, dx, partial, weights[1], d_rest, tokens,
        heads - rest_heads, rest_heads, x_t, x_h, dx.stride(0), table_t, eps, L2_EPS,
        **_settings(x, weights[0], tables, scale, l2), HAS_REST=d_rest is not None,
    )  # fmt: skip
    if partial is None or weights[0] is None:
        return dx, (None, None)
    first, *rest = partial.sum(1).to(weights[0].dtype).unbind()
    return dx, (first, rest[0] if rest else None)


class _PrepareHeads(torch.autograd.Function):
    """Heads of one kind, or queries and the keys behind them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        rest_weight: torch.Tensor | None,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        scale: torch.Tensor | None,
        eps: float,
        l2: bool,
        rest_heads: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = x if x.stride(-1) == 1 else x.contiguous()
        ctx.save_for_backward(x, weight, rest_weight, cos, sin, scale)
        ctx.eps, ctx.l2 = eps, l2
        return prepare_forward(
            x, (weight, rest_weight), tables_of(cos, sin), scale, eps, l2, rest_heads
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: torch.Tensor, d_rest: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, rest_weight, cos, sin, scale = ctx.saved_tensors
        dx, (dw, d_rest_weight) = prepare_backward(
            x, (weight, rest_weight), tables_of(cos, sin), scale, ctx.eps, ctx.l2, dy, d_rest
        )
        return dx, dw, d_rest_weight, None, None, None, None, None, None


def tables_of(cos: torch.Tensor | None, sin: torch.Tensor | None) -> Tables:
    """Both tables, or ``None`` without rotary."""
    return None if cos is None or sin is None else (cos, sin)


def _head_groups(blocks: int, heads: int, device: torch.device) -> int:
    """Number of programs that share the heads of a block of tokens: more than one only for few blocks."""
    return max(1, min(heads, cdiv(PROGRAMS_PER_UNIT * _units(device), blocks)))


@functools.lru_cache(maxsize=16)
def _units(device: torch.device) -> int:
    """Multiprocessors of a GPU; one for Triton's interpreter on the CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def prepare_heads(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    scale: torch.Tensor | None,
    l2: bool,
) -> torch.Tensor:
    """As :func:`megatron_hydra.ops.qk_preparation.prepare_heads`, in one pass."""
    if _has_no_step(norm_weight, tables, scale, l2):
        return x
    prepared: torch.Tensor = _apply(x, (norm_weight, None), eps, tables, scale, l2, 0)[0]
    return prepared


def prepare_queries_and_keys(
    x: torch.Tensor,
    key_heads: int,
    norms: Pair,
    eps: float,
    tables: Tables,
    scale: torch.Tensor | None,
    l2: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`megatron_hydra.ops.qk_preparation.prepare_queries_and_keys`, in one pass."""
    if _has_no_step(norms[0], tables, scale, l2):
        q, k = x.split((x.shape[1] - key_heads, key_heads), dim=1)
        return q, k
    q, k = _apply(x, norms, eps, tables, scale, l2, key_heads)
    return q, k


def _has_no_step(
    norm: torch.Tensor | None, tables: Tables, scale: torch.Tensor | None, l2: bool
) -> bool:
    return norm is None and tables is None and scale is None and not l2


def _apply(
    x: torch.Tensor,
    norms: Pair,
    eps: float,
    tables: Tables,
    scale: torch.Tensor | None,
    l2: bool,
    rest_heads: int,
) -> Any:
    cos, sin = tables if tables is not None else (None, None)
    return _PrepareHeads.apply(x, *norms, cos, sin, scale, eps, l2, rest_heads)
