"""Fused inference of a HydraHead layer (copied into every export; needs torch, uses triton).

With single operators, a layer needs about 170 kernel launches a token, and the GPU waits for the host. Here
it needs eleven. The projections of all heads are one matrix product, and these kernels do the rest:

    norm       x ← x + y and its RMSNorm
    heads      GDN: convolution, norms, rotation, delta rule of one token; FA: norms, scale, into the cache
    attend     FA: softmax over a part of the keys (parts run in parallel, as in FlashDecoding)
    fuse       FA: sum of the parts; all heads: gate, norm, γ, original order; last inputs of the convolution
    swiglu     SiLU(gate) · up

A prompt uses ``norm``, ``swiglu`` and two more kernels: ``prompt`` before the delta rule and the softmax, and
``prompt_fuse`` after them. Delta rule and softmax of a prompt are the functions of the plain layer.

In code that torch.compile traces, ``heads``, ``attend`` and ``fuse`` are one operator, see :func:`_registered`.
torch.compile makes its own kernels of the rest.

The reference is the layer in modeling_hydrahead.py. It rounds to the model's dtype at the same places, and
it runs whenever :func:`usable` returns False.

Projections with the same input share one storage. The parameters keep their names and are views of this
storage, so no weight is stored twice.

B: batch, D: hidden size, d: head_dim, n: GDN heads, f: FA heads, g: KV groups of FA heads, W: taps.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_hydrahead import SWITCHES

try:
    import triton
    import triton.language as tl
except Exception:  # not installed, or broken: the plain path always works
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD, LARGEST_HIDDEN = 256, 16384
COMPUTED = (
    "mixer", "window", "fusion", "fusion_norm", "fa_position", "fa_rotary_every", "fa_gate", "fa_gate_bias",
    "gdn_position", "qkv", "gdn_kv", "gdn_gate", "short_conv", "conv_width", "log_scale", "log_scale_a",
    "granularity",
)  # fmt: skip
"""Switches that the kernels compute, but for the values that :func:`_supported` refuses. A model with another
switch on runs by the plain layer."""

PROGRAMS, LARGEST_SPLIT = 4096, 128
"""Maximum number of programs of an attention (some waves, the last one not full), and of parts of the keys."""


def _jit(kernel: Any) -> Any:
    return kernel if triton is None else triton.jit(kernel)


COUNTS = (
    "past",
    "capacity",
    "mask_b",
    "N",
    "HEADS",
    "GROUPS",
    "width",
    "channels",
    "b_column",
    "a_column",
)
"""Arguments that change by token or by layer. Triton must not specialise kernels on their values."""


def _jit_of_counts(kernel: Any) -> Any:
    if triton is None:
        return kernel
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    return triton.jit(kernel, do_not_specialize=[name for name in COUNTS if name in names])


# -- kernels --------------------------------------------------------------------------------------


@_jit
def _norm_kernel(
    x, y, weight, total, out, size, eps,
    HAS_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * size
    c = tl.arange(0, BLOCK)
    inside = c < size
    kind = out.dtype.element_ty
    value = tl.load(x + row + c, inside, 0.0).to(tl.float32)
    if HAS_Y:
        value += tl.load(y + row + c, inside, 0.0).to(tl.float32)
        tl.store(total + row + c, value.to(kind), inside)
        value = value.to(kind).to(tl.float32)
    normed = (value * tl.rsqrt(tl.sum(value * value, 0) / size + eps)).to(kind).to(tl.float32)
    w = tl.load(weight + c, inside, 0.0).to(tl.float32)
    tl.store(out + row + c, (w * normed).to(kind), inside)


@_jit
def _swiglu_kernel(gate_up, out, size, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < size
    kind = out.dtype.element_ty
    gate = tl.load(gate_up + row * width + c, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * width + size + c, inside, 0.0).to(tl.float32)
    value = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * up
    tl.store(out + row * size + c, value.to(kind), inside)


@_jit
def _convolved(row, tail, weight, column, channel, taps, inside, channels, kind,
               W: tl.constexpr, HAS_CONV: tl.constexpr):  # fmt: skip
    """Channels of a projection after the short convolution.

    Args:
        row, tail: the current projection and the earlier inputs of one sequence.
        weight: ``[channels of the part, W]``.
        column, channel, taps: the channels' indices in ``row``, in ``tail`` and in ``weight``.
    """
    value = tl.load(row + column, inside, 0.0).to(tl.float32)
    if HAS_CONV:
        value = value * tl.load(weight + taps * W + W - 1, inside, 0.0).to(tl.float32)
        for back in tl.static_range(1, W):
            before = tl.load(tail + (W - 1 - back) * channels + channel, inside, 0.0)
            tap = tl.load(weight + taps * W + W - 1 - back, inside, 0.0)
            value += before.to(tl.float32) * tap.to(tl.float32)
        value = value.to(kind).to(tl.float32)
    return value


@_jit
def _prepared(x, other, weight, cos, sin, c, partner, inside, eps, kind,
              D: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROTARY: tl.constexpr):  # fmt: skip
    """RMSNorm and rotation of a head. ``other`` holds its channels ``partner``, the other rotary half."""
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        w = tl.load(weight + c, inside, 0.0).to(tl.float32)
        x = (w * (x * scale).to(kind).to(tl.float32)).to(kind).to(tl.float32)
        if HAS_ROTARY:
            w = tl.load(weight + partner, inside, 0.0).to(tl.float32)
            other = (w * (other * scale).to(kind).to(tl.float32)).to(kind).to(tl.float32)
    if HAS_ROTARY:
        turned = tl.where(c < D // 2, -other, other)
        angle_cos = tl.load(cos + c, inside, 0.0)
        angle_sin = tl.load(sin + c, inside, 0.0)
        x = (x * angle_cos + turned * angle_sin).to(kind).to(tl.float32)
    return x


@_jit
def _unit(x, kind):
    """Scale the vector to length 1."""
    return (x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)).to(kind).to(tl.float32)


@_jit
def _softplus(x):
    """log(1 + eˣ), exact to fp32 even if eˣ is much smaller than 1."""
    small = tl.exp(tl.minimum(x, 20.0))
    series = small * (1.0 - small * (0.5 - small * (0.3333333333 - small * 0.25)))
    value = tl.where(small < 0.03, series, tl.log(1.0 + small))
    return tl.where(x > 20.0, x, value)


@_jit_of_counts
def _heads_kernel(  # noqa: PLR0915  (three kinds of programs in one launch)
    projected, tail, state, out, fa_q, keys, values, past,
    gdn_table, fa_table, kv_table,
    q_taps, k_taps, v_taps, gdn_q_norm, gdn_k_norm, fa_q_norm, fa_k_norm,
    a_log, dt_bias, cos, sin, log_scale,
    width, channels, capacity, b_column, a_column, cos_b, scale_b,
    eps: tl.constexpr, softmax_scale: tl.constexpr,
    N, HEADS, GROUPS,
    D: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, W: tl.constexpr,
    HAS_CONV: tl.constexpr, HAS_NORM: tl.constexpr, GDN_ROTARY: tl.constexpr,
    FA_ROTARY: tl.constexpr, LOG_SCALE: tl.constexpr, PAST_IS_TENSOR: tl.constexpr,
):  # fmt: skip
    """A program computes columns of one GDN head's state, one FA head's query, or one group's key and value."""
    b = tl.program_id(1).to(tl.int64)
    program = tl.program_id(0)
    parts: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    kind = projected.dtype.element_ty
    row = projected + b * width
    cos += b * cos_b
    sin += b * cos_b
    c = tl.arange(0, BLOCK)
    inside = c < D
    partner = tl.where(c < D // 2, c + D // 2, c - D // 2)
    if program < N * parts:
        head = program // parts
        entry = gdn_table + head * 8
        q_column, k_column = tl.load(entry), tl.load(entry + 1)
        v_column = tl.load(entry + 2)
        q_channel, k_channel = tl.load(entry + 3), tl.load(entry + 4)
        v_channel = tl.load(entry + 5)
        q_tap, kv_tap = tl.load(entry + 6), tl.load(entry + 7)
        memory = tail + b * (W - 1) * channels
        q = _convolved(row, memory, q_taps, q_column + c, q_channel + c, q_tap + c, inside,
                       channels, kind, W, HAS_CONV)  # fmt: skip
        k = _convolved(row, memory, k_taps, k_column + c, k_channel + c, kv_tap + c, inside,
                       channels, kind, W, HAS_CONV)  # fmt: skip
        q_other, k_other = q, k
        if GDN_ROTARY:
            q_other = _convolved(row, memory, q_taps, q_column + partner, q_channel + partner,
                                 q_tap + partner, inside, channels, kind, W, HAS_CONV)  # fmt: skip
            k_other = _convolved(row, memory, k_taps, k_column + partner, k_channel + partner,
                                 kv_tap + partner, inside, channels, kind, W, HAS_CONV)  # fmt: skip
        q = _prepared(q, q_other, gdn_q_norm, cos, sin, c, partner, inside, eps, kind,
                      D, HAS_NORM, GDN_ROTARY)  # fmt: skip
        k = _prepared(k, k_other, gdn_k_norm, cos, sin, c, partner, inside, eps, kind,
                      D, HAS_NORM, GDN_ROTARY)  # fmt: skip
        q, k = _unit(q, kind) * softmax_scale, _unit(k, kind)
        j = (program % parts) * COLUMNS + tl.arange(0, COLUMNS)
        there = j < D
        v = _convolved(row, memory, v_taps, v_column + j, v_channel + j, kv_tap + j, there,
                       channels, kind, W, HAS_CONV)  # fmt: skip
        strength = tl.sigmoid(tl.load(row + b_column + head).to(tl.float32))
        step = tl.load(row + a_column + head).to(tl.float32) + tl.load(dt_bias + head).to(
            tl.float32
        )
        rate = tl.exp(tl.load(a_log + head).to(tl.float32))
        kept = tl.exp(-rate * _softplus(step))
        at = state + ((b * N + head) * D + c)[:, None] * D + j[None, :]
        mask = inside[:, None] & there[None, :]
        s = tl.load(at, mask, 0.0) * kept
        error = (v - tl.sum(s * k[:, None], 0)) * strength
        s += k[:, None] * error[None, :]
        tl.store(at, s, mask)
        o = tl.sum(s * q[:, None], 0)
        tl.store(out + (b * N + head) * D + j, o.to(kind), there)
    elif program < N * parts + HEADS:
        head = program - N * parts
        column = tl.load(fa_table + head)
        q = tl.load(row + column + c, inside, 0.0).to(tl.float32)
        other = tl.load(row + column + partner, inside, 0.0).to(tl.float32)
        q = _prepared(q, other, fa_q_norm, cos, sin, c, partner, inside, eps, kind,
                      D, HAS_NORM, FA_ROTARY)  # fmt: skip
        if LOG_SCALE:
            q = q * tl.load(log_scale + b * scale_b)
        tl.store(fa_q + (b * HEADS + head) * D + c, q.to(kind), inside)
    else:
        group = program - N * parts - HEADS
        k_column = tl.load(kv_table + group * 2)
        v_column = tl.load(kv_table + group * 2 + 1)
        k = tl.load(row + k_column + c, inside, 0.0).to(tl.float32)
        other = tl.load(row + k_column + partner, inside, 0.0).to(tl.float32)
        k = _prepared(k, other, fa_k_norm, cos, sin, c, partner, inside, eps, kind,
                      D, HAS_NORM, FA_ROTARY)  # fmt: skip
        v = tl.load(row + v_column + c, inside, 0.0)
        if PAST_IS_TENSOR:
            position = tl.load(past)
        else:
            position = past
        room = inside & (position < capacity)
        at = ((b * GROUPS + group) * capacity + position) * D + c
        tl.store(keys + at, k.to(kind), room)
        tl.store(values + at, v, room)


@_jit_of_counts
def _attend_kernel(
    q, keys, values, members, key_mask, sums, parts, past, capacity, mask_b,
    softmax_scale: tl.constexpr,
    HEADS, GROUPS, D: tl.constexpr, BLOCK: tl.constexpr,
    MEMBERS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    HAS_MASK: tl.constexpr, PAST_IS_TENSOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program computes all heads of one KV group for one part of the keys.

    It writes each head's largest logit and sum of exponentials to ``sums`` ``[B, f, SPLITS, 2]``, and the sum
    of values weighted by the exponentials to ``parts`` ``[B, f, SPLITS, D]``.
    """
    b = tl.program_id(0).to(tl.int64) // GROUPS
    group = tl.program_id(0) % GROUPS
    split = tl.program_id(1)
    if PAST_IS_TENSOR:
        last = tl.load(past)
    else:
        last = past
    end = tl.minimum(last + 1, capacity)
    share = tl.cdiv(tl.cdiv(end, SPLITS), KEYS) * KEYS
    start = split * share
    stop = tl.minimum(start + share, end)
    m = tl.arange(0, MEMBERS)
    head = tl.load(members + group * MEMBERS + m)
    real = head >= 0
    c = tl.arange(0, BLOCK)
    inside = c < D
    query = tl.load(
        q + ((b * HEADS + head) * D)[:, None] + c[None, :], real[:, None] & inside[None, :], 0.0
    )
    if WIDE:
        query = query.to(tl.float32)
    largest = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    weighted = tl.zeros([MEMBERS, BLOCK], tl.float32)
    first = (b * GROUPS + group) * capacity
    for begin in range(start, stop, KEYS):
        t = begin + tl.arange(0, KEYS)
        seen = t < stop
        at = (first + t)[:, None] * D + c[None, :]
        mask = seen[:, None] & inside[None, :]
        k = tl.load(keys + at, mask, 0.0)
        if HAS_MASK:
            seen = seen & ((tl.load(key_mask + b * mask_b + t, seen, 0) != 0) | (t == last))
        if WIDE:
            k = k.to(tl.float32)
        logits = tl.dot(query, tl.trans(k), input_precision="ieee") * softmax_scale
        logits = tl.where(seen[None, :], logits, float("-inf"))
        highest = tl.maximum(largest, tl.max(logits, 1))
        # Before the first visible key, −∞ − −∞ would be NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp(logits - base[:, None])
        shrink = tl.exp(largest - base)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(values + at, mask, 0.0)
        p = p.to(v.dtype)
        if WIDE:
            p, v = p.to(tl.float32), v.to(tl.float32)
        weighted = weighted * shrink[:, None] + tl.dot(p, v, input_precision="ieee")
        largest = highest
    place = (b * HEADS + head) * SPLITS + split
    tl.store(sums + place * 2, largest, real)
    tl.store(sums + place * 2 + 1, total, real)
    tl.store(parts + (place * D)[:, None] + c[None, :], weighted, real[:, None] & inside[None, :])


@_jit_of_counts
def _fuse_kernel(  # noqa: PLR0915
    projected, gdn_out, sums, parts, tail, table, gamma, out, past, width, channels, capacity,
    eps: tl.constexpr,
    N, HEADS, D: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr, W: tl.constexpr,
    HAS_FA: tl.constexpr, HAS_GDN: tl.constexpr, HAS_TAIL: tl.constexpr, FA_GATE: tl.constexpr,
    GDN_GATE: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_GAMMA: tl.constexpr, PAST_IS_TENSOR: tl.constexpr,
):  # fmt: skip
    """A program computes one head, in the model's order of heads."""
    b = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0)
    kind = projected.dtype.element_ty
    row = projected + b * width
    entry = table + head * 9
    is_gdn = tl.load(entry)
    number = tl.load(entry + 1)
    gate_column = tl.load(entry + 2)
    c = tl.arange(0, BLOCK)
    inside = c < D
    x = tl.zeros([BLOCK], tl.float32)
    if is_gdn == 0:
        if HAS_FA:
            place = (b * HEADS + number) * SPLITS
            s = tl.arange(0, SPLITS)
            largest = tl.load(sums + (place + s) * 2)
            highest = tl.max(largest, 0)
            total = tl.sum(tl.exp(largest - highest) * tl.load(sums + (place + s) * 2 + 1), 0)
            for begin in tl.static_range(0, SPLITS, CHUNK):
                s2 = begin + tl.arange(0, CHUNK)
                weight = tl.exp(tl.load(sums + (place + s2) * 2) - highest)
                rows = tl.load(
                    parts + ((place + s2) * D)[:, None] + c[None, :], inside[None, :], 0.0
                )
                x += tl.sum(weight[:, None] * rows, 0)
            x = x / total
            if PAST_IS_TENSOR:
                # A token beyond the capacity of a static cache must cause an error.
                x = tl.where(tl.load(past) < capacity, x, float("nan"))
            x = x.to(kind).to(tl.float32)
        if FA_GATE:
            gate = tl.load(row + gate_column + c, inside, 0.0).to(tl.float32)
            x = (x * (2.0 * tl.sigmoid(gate).to(kind).to(tl.float32))).to(kind).to(tl.float32)
    else:
        if HAS_GDN:
            x = tl.load(gdn_out + (b * N + number) * D + c, inside, 0.0).to(tl.float32)
        if GDN_GATE:
            gate = tl.load(row + gate_column + c, inside, 0.0).to(tl.float32)
            x = (x * (2.0 * tl.sigmoid(gate).to(kind).to(tl.float32))).to(kind).to(tl.float32)
        if HAS_TAIL:
            owner = tl.load(entry + 3)
            memory = tail + b * (W - 1) * channels
            column, channel = tl.load(entry + 4), tl.load(entry + 5)
            _moved(row + column, memory + channel, c, inside, channels, W)
            if owner != 0:
                kv_channel = tl.load(entry + 6)
                _moved(row + tl.load(entry + 7), memory + kv_channel, c, inside, channels, W)
                kv_channel += owner
                _moved(row + tl.load(entry + 8), memory + kv_channel, c, inside, channels, W)
    if HAS_NORM:
        x = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    if HAS_GAMMA:
        x = x * tl.load(gamma + head).to(tl.float32)
    tl.store(out + (b * (N + HEADS) + head) * D + c, x.to(kind), inside)


@_jit
def _moved(row, memory, c, inside, channels, W: tl.constexpr):
    """Shift the convolution's last inputs by one token."""
    for t in tl.static_range(W - 2):
        tl.store(
            memory + t * channels + c, tl.load(memory + (t + 1) * channels + c, inside, 0.0), inside
        )
    tl.store(memory + (W - 2) * channels + c, tl.load(row + c, inside, 0.0), inside)


@_jit
def _convolved_half(
    rows, tail, weight, t, column, channel, taps, c, tokens, width, channels, kind,
    W: tl.constexpr, HAS_CONV: tl.constexpr, HAS_TAIL: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Half of a head's channels for a block of tokens, after the short convolution; see ``_convolved``."""
    inside = (c < HALF)[None, :]
    there = (t < tokens)[:, None] & inside
    value = tl.load(rows + (t * width + column)[:, None] + c[None, :], there, 0.0).to(tl.float32)
    if HAS_CONV:
        value *= tl.load(weight + (taps + c) * W + W - 1, c < HALF, 0.0).to(tl.float32)[None, :]
        for back in tl.static_range(1, W):
            before = t - back
            now = there & (before >= 0)[:, None]
            x = tl.load(rows + (before * width + column)[:, None] + c[None, :], now, 0.0)
            x = x.to(tl.float32)
            if HAS_TAIL:
                earlier = inside & (before < 0)[:, None]
                at = tail + ((before + W - 1) * channels + channel)[:, None] + c[None, :]
                x += tl.load(at, earlier, 0.0).to(tl.float32)
            tap = tl.load(weight + (taps + c) * W + W - 1 - back, c < HALF, 0.0).to(tl.float32)
            value += x * tap[None, :]
        value = value.to(kind).to(tl.float32)
    return value


@_jit_of_counts
def _prompt_kernel(  # noqa: C901, PLR0915  (five kinds of programs in one launch)
    projected, tail, out, table, taps, gdn_q_norm, gdn_k_norm, fa_q_norm, fa_k_norm,
    cos, sin, log_scale, tokens, width, channels, cos_b, scale_b,
    eps: tl.constexpr, N, KV, HEADS, GROUPS,
    D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, W: tl.constexpr,
    HAS_CONV: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_NORM: tl.constexpr,
    GDN_ROTARY: tl.constexpr, FA_ROTARY: tl.constexpr, LOG_SCALE: tl.constexpr,
):  # fmt: skip
    """A program computes q, k or v of one head for a block of tokens.

    ``out`` holds q, k, v of GDN heads, ``[B, T, N or KV, D]``, then q and k of FA heads, ``[B, HEADS or GROUPS,
    T, D]``.
    """
    HALF: tl.constexpr = D // 2
    b = tl.program_id(2).to(tl.int64)
    batch = tl.num_programs(2).to(tl.int64)
    kind = projected.dtype.element_ty
    rows = projected + b * tokens * width
    memory = tail + b * (W - 1) * channels
    cos += b * cos_b
    sin += b * cos_b
    entry = table + tl.program_id(1) * 5
    part, number, column = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    channel, tap = tl.load(entry + 3), tl.load(entry + 4)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.arange(0, BLOCK)
    mask = (t < tokens)[:, None] & (c < HALF)[None, :]
    size = batch * tokens * D
    if part < 3:
        x1 = _convolved_half(rows, memory, taps, t, column, channel, tap, c, tokens, width,
                             channels, kind, W, HAS_CONV, HAS_TAIL, HALF)  # fmt: skip
        x2 = _convolved_half(rows, memory, taps, t, column + HALF, channel + HALF, tap + HALF, c,
                             tokens, width, channels, kind, W, HAS_CONV, HAS_TAIL, HALF)  # fmt: skip
        heads = N
        if part > 0:
            heads = KV
            out += size * N
        if part > 1:
            out += size * KV
        out += (b * tokens * heads + number) * D
        step = heads * D
    else:
        x1 = tl.load(rows + (t * width + column)[:, None] + c[None, :], mask, 0.0).to(tl.float32)
        x2 = tl.load(rows + (t * width + column + HALF)[:, None] + c[None, :], mask, 0.0)
        x2 = x2.to(tl.float32)
        out += size * (N + 2 * KV)
        heads = HEADS
        if part > 3:
            heads = GROUPS
            out += size * HEADS
        out += (b * heads + number) * tokens * D
        step = heads * 0 + D
    if part != 2:
        if HAS_NORM:
            norm = gdn_q_norm
            if part == 1:
                norm = gdn_k_norm
            if part == 3:
                norm = fa_q_norm
            if part == 4:
                norm = fa_k_norm
            scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
            w1 = tl.load(norm + c, c < HALF, 0.0).to(tl.float32)[None, :]
            w2 = tl.load(norm + HALF + c, c < HALF, 0.0).to(tl.float32)[None, :]
            x1 = (w1 * (x1 * scale).to(kind).to(tl.float32)).to(kind).to(tl.float32)
            x2 = (w2 * (x2 * scale).to(kind).to(tl.float32)).to(kind).to(tl.float32)
        if GDN_ROTARY or FA_ROTARY:
            turns = GDN_ROTARY
            if part > 2:
                turns = FA_ROTARY
            if turns:
                angle_cos = tl.load(cos + (t * D)[:, None] + c[None, :], mask, 0.0)
                angle_sin = tl.load(sin + (t * D)[:, None] + c[None, :], mask, 0.0)
                y1 = (x1 * angle_cos - x2 * angle_sin).to(kind).to(tl.float32)
                x2 = (x2 * angle_cos + x1 * angle_sin).to(kind).to(tl.float32)
                x1 = y1
        if part < 2:
            length = tl.rsqrt(tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1) + 1e-6)[:, None]
            x1, x2 = x1 * length, x2 * length
        if LOG_SCALE:  # noqa: SIM102  (known when compiled)
            if part == 3:
                s = tl.load(log_scale + b * scale_b + t, t < tokens, 0.0)[:, None]
                x1, x2 = x1 * s, x2 * s
    at = out + (t * step)[:, None] + c[None, :]
    tl.store(at, x1.to(kind), mask)
    tl.store(at + HALF, x2.to(kind), mask)


@_jit_of_counts
def _prompt_fuse_kernel(
    projected, gdn_out, fa_out, table, gamma, out, tokens, width, fa_b, fa_h, fa_t, eps, N, HEADS,
    D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, FA_GATE: tl.constexpr,
    GDN_GATE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_GAMMA: tl.constexpr,
):  # fmt: skip
    """A program applies gate, norm and γ to one head, in the model's order, for a block of tokens."""
    b = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    kind = projected.dtype.element_ty
    entry = table + head * 9
    is_gdn, number, gate_column = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.arange(0, BLOCK)
    mask = (t < tokens)[:, None] & (c < D)[None, :]
    if is_gdn == 0:
        at = fa_out + b * fa_b + number * fa_h + (t * fa_t)[:, None] + c[None, :]
        x = tl.load(at, mask, 0.0).to(tl.float32)
    else:
        at = gdn_out + ((b * tokens + t) * N + number)[:, None] * D + c[None, :]
        x = tl.load(at, mask, 0.0).to(tl.float32)
    if FA_GATE or GDN_GATE:
        gated = GDN_GATE
        if is_gdn == 0:
            gated = FA_GATE
        if gated:
            at = projected + ((b * tokens + t) * width + gate_column)[:, None] + c[None, :]
            gate = tl.load(at, mask, 0.0).to(tl.float32)
            x = (x * (2.0 * tl.sigmoid(gate).to(kind).to(tl.float32))).to(kind).to(tl.float32)
    if HAS_NORM:
        x = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    if HAS_GAMMA:
        x = x * tl.load(gamma + head).to(tl.float32)
    at = out + ((b * tokens + t) * (N + HEADS) + head)[:, None] * D + c[None, :]
    tl.store(at, x.to(kind), mask)


# -- weights --------------------------------------------------------------------------------------


class FusedLinear:
    """Several linear maps of one input as one product. Their parameters become views of one storage.

    Attributes:
        weight: ``[rows, D]``; rows are padded to a multiple of 16, which fast products need.
        bias: ``[rows]``, zero for maps without a bias; ``None`` if no map has one.
        columns: name of a map -> its first output column.
    """

    def __init__(self, maps: dict[str, nn.Linear]) -> None:
        self.maps = tuple(maps.values())
        sizes = [m.out_features for m in self.maps]
        first = self.maps[0].weight
        rows = -(-sum(sizes) // 16) * 16
        self.columns = {}
        # Must not be an inference tensor: the parameters may be trained later.
        with torch.inference_mode(False), torch.no_grad():
            self.weight = first.new_zeros(rows, first.shape[1])
            biased = any(m.bias is not None for m in self.maps)
            self.bias = first.new_zeros(rows) if biased else None
            begin = 0
            for (name, m), size in zip(maps.items(), sizes, strict=True):
                self.columns[name] = begin
                part = self.weight[begin : begin + size]
                part.copy_(m.weight)
                m.weight.data = part
                if m.bias is not None and self.bias is not None:
                    part = self.bias[begin : begin + size]
                    part.copy_(m.bias)
                    m.bias.data = part
                begin += size
        _stay(self.weight, self.bias)

    def release(self) -> None:
        """Give every parameter that is still in this storage its own storage."""
        ours = [x.untyped_storage().data_ptr() for x in (self.weight, self.bias) if x is not None]
        with torch.inference_mode(False), torch.no_grad():
            for m in self.maps:
                for parameter in (m.weight, m.bias):
                    if parameter is not None and parameter.untyped_storage().data_ptr() in ours:
                        parameter.data = parameter.data.clone()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[…, D]`` → ``[…, rows]``."""
        return F.linear(x, self.weight, self.bias)


def _stay(*tensors: torch.Tensor | None) -> None:
    """Tell torch.compile that these keep their address. Otherwise every replay of a CUDA graph copies them."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.mark_static_address(tensor)


class FusedLayer:
    """Fused weights and tables of a decoder layer. Never copied or saved with the layer."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.heads = FusedLinear(projections(attention))
        self.mlp = FusedLinear({"gate": mlp.gate_proj, "up": mlp.up_proj})
        device = self.heads.weight.device
        with torch.inference_mode(False):
            self.tables = {
                name: torch.tensor(rows, dtype=torch.int32, device=device)
                for name, rows in _tables(attention, self.heads.columns).items()
            }
        _stay(*self.tables.values())
        # Lists, because they are checked before every call. The layer's own hooks run in both paths, so they
        # are not in the lists.
        inside = [m for m in layer.modules() if m is not layer]
        self._hooks = [h for m in inside for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._attributes = [m.__dict__ for m in inside]
        self._parts = [p for m in (*inside, layer) for p in (m._modules, m._parameters)]
        self._found = self._present()
        self._weights = [m.weight for m in inside if isinstance(m, nn.Linear)]
        self._places = [weight.data_ptr() for weight in self._weights]

    def _present(self) -> list[Any]:
        return list(itertools.chain.from_iterable(part.values() for part in self._parts))

    def holds(self) -> bool:
        """Whether modules and weights are still the fused ones, and no hooks were added."""
        return not (
            any(self._hooks)
            or any("forward" in attributes for attributes in self._attributes)
            or [*map(id, self._present())] != [*map(id, self._found)]
            or [weight.data_ptr() for weight in self._weights] != self._places
        )

    def release(self) -> None:
        """Give the parameters their own storage again."""
        self.heads.release()
        self.mlp.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def projections(attention: Any) -> dict[str, nn.Linear]:
    """All maps of the layer's input, by name."""
    names = [f"{p}_proj" for p in ("k", "v")] if attention.tied else []
    for branch, heads in (("fa", attention.fa_heads), ("gdn", attention.gdn_heads)):
        if heads:
            names += [f"{branch}_{p}_proj" for p in (("q",) if attention.tied else ("q", "k", "v"))]
            names += [f"{branch}_gate_proj"] if attention.switches[f"{branch}_gate"] else []
    if attention.gdn_heads:
        names += ["gdn_b_proj", "gdn_a_proj"]
    return {name: getattr(attention, name) for name in names}


def _tables(attention: Any, columns: dict[str, int]) -> dict[str, list[Any]]:
    """Index tables of every head for the kernels: columns of ``projected``, channels, taps."""
    d, n = attention.head_dim, len(attention.gdn_heads)

    def kv(branch: str, part: str, group: int) -> int:
        if attention.tied:
            return columns[f"{part}_proj"] + attention.tied_groups[branch][group] * d
        return columns[f"{branch}_{part}_proj"] + group * d

    groups = max(attention.fa_groups) + 1 if attention.fa_heads else 0
    members = [
        [i for i, g in enumerate(attention.fa_groups) if g == group] for group in range(groups)
    ]
    widest = 16
    while members and widest < max(map(len, members)):
        widest *= 2
    everything: list[Any] = [None] * (len(attention.fa_heads) + n)
    for i, head in enumerate(attention.fa_heads):
        everything[head] = [0, i, columns.get("fa_gate_proj", 0) + i * d, 0, 0, 0, 0, 0, 0]
    gdn, owned = [], set()
    shared = (max(attention.gdn_groups) + 1) * d if n else 0  # channels of k, and of v
    for i, head in enumerate(attention.gdn_heads):
        group = attention.gdn_groups[i]
        q_column = columns["gdn_q_proj"] + i * d
        k_column, v_column = kv("gdn", "k", group), kv("gdn", "v", group)
        k_channel = (n + group) * d
        gdn.append(
            [q_column, k_column, v_column, i * d, k_channel, k_channel + shared, i * d, group * d]
        )
        owner = 0 if group in owned else shared
        owned.add(group)
        everything[head] = [
            1, i, columns.get("gdn_gate_proj", 0) + i * d, owner, q_column, i * d, k_channel,
            k_column, v_column,
        ]  # fmt: skip
    units = [[0, i, e[0], e[3], e[6]] for i, e in enumerate(gdn)]
    for part, column, channel in ((1, 1, 4), (2, 2, 5)):
        for group in sorted(set(attention.gdn_groups)):
            e = gdn[attention.gdn_groups.index(group)]
            # The taps of q, k and v follow each other, like the channels.
            units.append([part, group, e[column], e[channel], e[channel]])
    units += [[3, i, columns["fa_q_proj"] + i * d, 0, 0] for i in range(len(attention.fa_heads))]
    units += [[4, g, kv("fa", "k", g), 0, 0] for g in range(groups)]
    return {
        "units": units,
        "gdn": gdn or [[0]],
        "fa": [columns["fa_q_proj"] + i * d for i in range(len(attention.fa_heads))] or [0],
        "kv": [[kv("fa", "k", g), kv("fa", "v", g)] for g in range(groups)] or [[0]],
        "members": [m + [-1] * (widest - len(m)) for m in members] or [[-1] * widest],
        "all": everything,
    }


# -- the step -------------------------------------------------------------------------------------


def _supported(config: Any) -> bool:
    """Whether the kernels support the model's switches."""
    switches = config.hydra
    return (
        config.gdn_kernel == "auto"
        and all(
            SWITCHES[name][0] == value for name, value in switches.items() if name not in COMPUTED
        )
        and switches["mixer"] == "head"
        and switches["fusion"] != "gated"
        and config.hidden_act in ("silu", "swish")
        and config.head_dim % 2 == 0
        and config.head_dim <= LARGEST_HEAD
        and config.hidden_size <= LARGEST_HIDDEN
    )


def _complete(attention: Any) -> bool:
    """Whether the kernels use every part of the attention that has parameters."""
    parts = {name.partition(".")[0] for name, _ in attention.named_parameters()}
    known = {*projections(attention), "o_proj", "gamma", "gdn_A_log", "gdn_dt_bias"}
    return all(part in known or part.endswith(("_norm", "_conv")) for part in parts)


def _plain(layer: Any, x: torch.Tensor) -> bool:
    """Whether the layer's modules are unchanged (no adapters, hooks, other dtypes or other devices)."""
    attention = layer.self_attn
    linears = [*projections(attention).values(), attention.o_proj]
    linears += [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    for module in linears:
        # No adapters, no quantized weights, no parameters in the storage of another owner (FSDP).
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
            return False
        weight = module.weight
        whole = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
        if weight.is_inference() or not whole:
            return False
    kept_wide = [attention.gdn_A_log, attention.gdn_dt_bias] if attention.gdn_heads else []
    if any(
        p.device != x.device or (p.dtype != x.dtype and all(p is not w for w in kept_wide))
        for p in layer.parameters()
    ):
        return False
    return not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__
        for m in layer.modules()
        # The Hub's kernels replace functions by equal ones: the delta rule, and transformers' SiLU.
        if m is not layer and not hasattr(type(m), "kernel_layer_name")
    )


def keep_if_whole(layer: Any) -> bool:
    """Return whether a layer's weights are fused. If the layer has changed, undo the fusion first."""
    if layer.fused is not None and not layer.fused.holds():
        layer.fused.release()
        layer.fused = None
    return layer.fused is not None


def prepare(layer: Any, x: torch.Tensor) -> None:
    """Fuse the weights of a layer if the kernels support it.

    Not to be called in compiled or captured code, which uses the layer as it is.
    """
    if keep_if_whole(layer):
        return
    if (
        triton is not None
        and (x.is_cuda or INTERPRETED)
        and x.dtype in DTYPES
        and _supported(layer.self_attn.config)
        and _complete(layer.self_attn)
        and _plain(layer, x)
    ):
        layer.fused = FusedLayer(layer)


def usable(layer: Any, x: torch.Tensor, context: Any, cache: Any) -> bool:
    """Whether :func:`decode` supports this call: one real token a row after earlier tokens, no gradient."""
    if torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling():
        if torch.is_autocast_enabled(x.device.type):
            return False
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            prepare(layer, x)  # fuse at the prompt: the decode steps may be captured
    if layer.fused is None or cache is None or x.shape[1] != 1:
        return False
    if not cache.begun or cache.record_past:
        return False
    if context.valid is not None or context.documents is not None:
        return False
    attention = layer.self_attn
    held = [(cache.keys, x.dtype), (cache.values, x.dtype)] if attention.fa_heads else []
    if attention.gdn_heads:
        held.append((cache.state, torch.float32))
        if attention.switches["short_conv"]:
            held.append((cache.tail, x.dtype))
    return all(t is not None and t.dtype == dtype and t.is_contiguous() for t, dtype in held)


def normed(
    x: torch.Tensor, norm: Any, y: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """X + y (x if y is None) and its RMSNorm; ``[…, D]``."""
    if torch.compiler.is_compiling():
        total = x if y is None else x + y
        return total, norm(total)
    out = torch.empty_like(x)
    total = x if y is None else torch.empty_like(x)
    size = x.shape[-1]
    _norm_kernel[(x.numel() // size,)](
        x, x if y is None else y, norm.weight, total, out, size, norm.eps,
        HAS_Y=y is not None, BLOCK=_power(size), num_warps=8,
    )  # fmt: skip
    return total, out


def swiglu(gate_up: torch.Tensor, size: int) -> torch.Tensor:
    """``[…, width]`` → ``[…, size]``. The first ``size`` columns are the gate, the next ``size`` columns up."""
    if torch.compiler.is_compiling():
        return F.silu(gate_up[..., :size]) * gate_up[..., size : 2 * size]
    out = gate_up.new_empty(*gate_up.shape[:-1], size)
    rows, width = out.numel() // size, gate_up.shape[-1]
    _swiglu_kernel[(rows, -(-size // 512))](gate_up, out, size, width, BLOCK=512, num_warps=4)
    return out


def _device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make ``x``'s device current: Triton launches on the current device, not on the tensors' device."""
    if x.is_cuda and not torch.compiler.is_compiling():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _around(layer: Any, x: torch.Tensor, mix: Any, context: Any, cache: Any) -> torch.Tensor:
    """All parts of a layer except its heads. One token and several tokens share them."""
    x, hidden = normed(x.contiguous(), layer.input_layernorm)
    mixed = layer.self_attn.o_proj(mix(layer, hidden, context, cache))
    x, hidden = normed(x, layer.post_attention_layernorm, mixed)
    mlp = layer.mlp
    return x + mlp.down_proj(swiglu(layer.fused.mlp(hidden), mlp.gate_proj.out_features))


def decode(layer: Any, x: torch.Tensor, context: Any, cache: Any) -> torch.Tensor:
    """Run a decoder layer on one token a row; update the cache in place.

    Args:
        x: ``[B, 1, D]``.
        context, cache: the arguments of the layer.

    Returns:
        ``[B, 1, D]``.
    """
    with _device_of(x):
        return _around(layer, x, heads, context, cache)


def prompt_usable(layer: Any, x: torch.Tensor, context: Any) -> bool:
    """Whether :func:`read` supports this call. Call :func:`usable` first, which fuses the weights."""
    return (
        layer.fused is not None
        and x.shape[1] > 1
        and context.documents is None
        and not layer.self_attn.tied
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )


def read(layer: Any, x: torch.Tensor, context: Any, cache: Any) -> torch.Tensor:
    """Run a decoder layer on several tokens a row; same result as the layer."""
    with _device_of(x):
        return _around(layer, x, prompt_heads, context, cache)


def prompt_heads(layer: Any, x: torch.Tensor, context: Any, cache: Any) -> torch.Tensor:
    """All heads, fused and in the model's order; ``[B, T, D]`` → ``[B, T, H·d]``."""
    attention, fused = layer.self_attn, layer.fused
    config, switches, tables = attention.config, attention.switches, fused.tables
    batch, length, d = *x.shape[:2], attention.head_dim
    n, f = len(attention.gdn_heads), len(attention.fa_heads)
    kv = max(attention.gdn_groups) + 1 if n else 0
    groups = max(attention.fa_groups) + 1 if f else 0
    projected, columns = fused.heads(x), fused.heads.columns
    width = projected.shape[-1]
    nothing = projected  # placeholder for tensors that a layer does not have
    has_conv, w, channels = bool(n and switches["short_conv"]), 1, (n + 2 * kv) * d
    taps, tail = nothing, None
    if has_conv:
        w = switches["conv_width"]
        taps = torch.cat([getattr(attention, f"gdn_{p}_conv").weight for p in ("q", "k", "v")])
        tail = None if cache is None else cache.tail
    half, per_token = _power(d // 2), (n + 2 * kv + f + groups) * d
    made = x.new_empty(batch * length * per_token)
    position = switches["fa_position"]
    _prompt_kernel[(-(-length // 16), n + 2 * kv + f + groups, batch)](
        projected, nothing if tail is None else tail.contiguous(), made, tables["units"], taps,
        *_norms(attention, nothing), context.cos, context.sin, context.log_scale,
        length, width, channels,
        length * d if context.cos.shape[0] > 1 else 0,
        length if context.log_scale.shape[0] > 1 else 0,
        config.rms_norm_eps, n, kv, f, groups,
        D=d, BLOCK=half, TOKENS=16, W=w, HAS_CONV=has_conv, HAS_TAIL=tail is not None and w > 1,
        HAS_NORM=bool(config.qk_norm), GDN_ROTARY=switches["gdn_position"] == "rope",
        FA_ROTARY=config.fa_rotates(attention.layer_idx), LOG_SCALE=position in ("log-scale", "both"),
        num_warps=4,
    )  # fmt: skip
    q, k, v, fa_q, fa_k = made.split([batch * length * m * d for m in (n, kv, kv, f, groups)])
    gdn_out = fa_out = nothing
    if f:
        fa_v = projected[..., columns["fa_v_proj"] :][..., : groups * d]
        attended = attention.attend(
            fa_q.view(batch, f, length, d),
            fa_k.view(batch, groups, length, d),
            fa_v.unflatten(-1, (groups, d)).transpose(1, 2),
            context, cache,
        )  # fmt: skip
        fa_out = attended if attended.stride(-1) == 1 else attended.contiguous()
    if n:
        if has_conv and cache is not None:
            begin = columns["gdn_q_proj"]
            attention.remember_tail(projected[..., begin : begin + channels], context, cache)
        log_alpha, beta = attention.gates(
            projected[..., columns["gdn_a_proj"] :][..., :n],
            projected[..., columns["gdn_b_proj"] :][..., :n],
        )
        shape = (batch, length, -1, d)
        gdn_out = attention.recur(
            q.view(shape), k.view(shape), v.view(shape), log_alpha, beta, context, cache
        ).contiguous()
    concat = switches["fusion"] == "concat"
    out = x.new_empty(batch, length, (n + f) * d)
    strides = fa_out.stride()[:3] if f else (0, 0, 0)
    _prompt_fuse_kernel[(-(-length // 16), n + f, batch)](
        projected, gdn_out, fa_out, tables["all"], nothing if concat else attention.gamma, out,
        length, width, *strides, config.rms_norm_eps, n, f,
        D=d, BLOCK=max(16, _power(d)), TOKENS=16, FA_GATE=bool(switches["fa_gate"]),
        GDN_GATE=bool(switches["gdn_gate"]), HAS_NORM=switches["fusion_norm"] == "rms",
        HAS_GAMMA=not concat, num_warps=4,
    )  # fmt: skip
    return out


def _norms(attention: Any, nothing: torch.Tensor) -> list[torch.Tensor]:
    """Norm weights ``[d]`` of GDN's q and k and of FA's q and k; ``nothing`` for a norm that does not exist."""
    weights = []
    for branch, there in (("gdn", attention.gdn_heads), ("fa", attention.fa_heads)):
        for part in ("q", "k"):
            name = f"{part}_norm" if attention.tied else f"{branch}_{part}_norm"
            has = there and attention.config.qk_norm
            weights.append(getattr(attention, name).weight if has else nothing)
    return weights


def heads(layer: Any, x: torch.Tensor, context: Any, cache: Any) -> torch.Tensor:
    """All heads of one token a row, fused and in the model's order; ``[B, 1, D]`` → ``[B, 1, H·d]``."""
    attention, fused = layer.self_attn, layer.fused
    config, switches, tables = attention.config, attention.switches, fused.tables
    n, f = len(attention.gdn_heads), len(attention.fa_heads)
    projected, columns = fused.heads(x), fused.heads.columns
    nothing = projected  # placeholder for weights that a layer does not have
    keys = values = key_mask = None
    if f:
        keys, values = cache.reserve(1)
        key_mask = context.visibility.key_mask
    has_conv = bool(n and switches["short_conv"])
    taps = [nothing] * 3
    if has_conv:
        taps = [getattr(attention, f"gdn_{p}_conv").weight for p in ("q", "k", "v")]
    position, concat = switches["fa_position"], switches["fusion"] == "concat"
    weights = [
        *taps, *_norms(attention, nothing),
        attention.gdn_A_log if n else nothing, attention.gdn_dt_bias if n else nothing,
        nothing if concat else attention.gamma,
    ]  # fmt: skip
    past = cache.length
    tensor = isinstance(past, torch.Tensor)
    launch = _OPERATOR if torch.compiler.is_compiling() else _launch
    return launch(
        projected, past if tensor else None, 0 if tensor else past,
        cache.tail if has_conv else None, cache.state if n else None, keys, values, key_mask,
        context.cos, context.sin, context.log_scale,
        [tables[name] for name in ("gdn", "fa", "kv", "members", "all")], weights,
        head_dim=attention.head_dim, gdn_heads=n, fa_heads=f,
        taps=switches["conv_width"] if has_conv else 1,
        b_column=columns.get("gdn_b_proj", 0), a_column=columns.get("gdn_a_proj", 0),
        eps=config.rms_norm_eps, qk_norm=bool(config.qk_norm),
        gdn_rotary=switches["gdn_position"] == "rope", fa_rotary=config.fa_rotates(attention.layer_idx),
        scaled=position in ("log-scale", "both"), fa_gate=bool(switches["fa_gate"]),
        gdn_gate=bool(switches["gdn_gate"]), fusion_norm=switches["fusion_norm"] == "rms",
        has_gamma=not concat,
    )  # fmt: skip


def _launch(
    projected: torch.Tensor, past: torch.Tensor | None, length: int,
    tail: torch.Tensor | None, state: torch.Tensor | None,
    keys: torch.Tensor | None, values: torch.Tensor | None, key_mask: torch.Tensor | None,
    cos: torch.Tensor, sin: torch.Tensor, log_scale: torch.Tensor,
    tables: list[torch.Tensor], weights: list[torch.Tensor],
    *,
    head_dim: int, gdn_heads: int, fa_heads: int, taps: int, b_column: int, a_column: int,
    eps: float, qk_norm: bool, gdn_rotary: bool, fa_rotary: bool, scaled: bool,
    fa_gate: bool, gdn_gate: bool, fusion_norm: bool, has_gamma: bool,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernels of all heads; :func:`heads` has the meaning of the flags.

    Args:
        projected: ``[B, 1, width]``.
        past, length: number of tokens in the cache, as a tensor on the device, or a number if ``past`` is None.
        tail, state: ``[B, W - 1, channels]`` and fp32 ``[B, n, d, d]``, written in place; None without them.
        keys, values: ``[B, g, capacity, d]``, written in place; None without FA heads.
        key_mask: bool ``[B or 1, capacity]``; None if all keys are visible.
        cos, sin: fp32 ``[B or 1, 1, 1, d]``; ``log_scale`` is fp32 ``[B or 1, 1, 1, 1]``.
        tables: int32 tables of GDN heads, FA heads, KV groups, a group's heads, all heads; see ``_tables``.
        weights: taps of q, k and v, four norms, A_log, dt_bias and γ; any tensor in place of a missing one.

    Returns:
        ``[B, 1, H·d]``.
    """
    gdn_table, fa_table, kv_table, members, all_heads = tables
    batch, width, d, n, f = *projected.shape[::2], head_dim, gdn_heads, fa_heads
    block = max(16, _power(d))
    out = projected.new_empty(batch, 1, (n + f) * d)
    nothing = projected  # placeholder for tensors that a layer does not have
    groups, capacity = (0, 1) if keys is None else keys.shape[1:3]
    fa_q = projected.new_empty(batch, f, d) if f else nothing
    gdn_out = projected.new_empty(batch, n, d) if n else nothing
    channels = 0 if tail is None else tail.shape[2]
    tail_or_none = nothing if tail is None else tail
    tokens = length if past is None else past
    columns_of_state = min(32, block)
    parts_of_state = -(-d // columns_of_state)
    scale = d**-0.5
    _heads_kernel[(n * parts_of_state + f + groups, batch)](
        projected, tail_or_none, nothing if state is None else state, gdn_out, fa_q,
        nothing if keys is None else keys, nothing if values is None else values, tokens,
        gdn_table, fa_table, kv_table, *weights[:9], cos, sin, log_scale,
        width, channels, capacity, b_column, a_column,
        d if cos.shape[0] > 1 else 0, 1 if log_scale.shape[0] > 1 else 0,
        eps, scale,
        N=n, HEADS=f, GROUPS=groups, D=d, BLOCK=block, COLUMNS=columns_of_state, W=taps,
        HAS_CONV=tail is not None, HAS_NORM=qk_norm, GDN_ROTARY=gdn_rotary, FA_ROTARY=fa_rotary,
        LOG_SCALE=scaled, PAST_IS_TENSOR=past is not None, num_warps=4,
    )  # fmt: skip
    splits, sums, parts = 1, nothing, nothing
    if f:
        # Powers of two, because each value compiles a variant of the kernels.
        while (
            splits < LARGEST_SPLIT
            and splits * batch * groups * 2 <= PROGRAMS
            and splits * 256 <= capacity
        ):
            splits *= 2
        device = projected.device
        sums = torch.empty(batch, f, splits, 2, dtype=torch.float32, device=device)
        parts = torch.empty(batch, f, splits, d, dtype=torch.float32, device=device)
        wide = projected.element_size() > 2
        _attend_kernel[(batch * groups, splits)](
            fa_q, keys, values, members,
            nothing if key_mask is None else key_mask.view(torch.uint8),
            sums, parts, tokens, capacity, 0 if key_mask is None else key_mask.stride(0), scale,
            HEADS=f, GROUPS=groups, D=d, BLOCK=block, MEMBERS=members.shape[1],
            KEYS=32 if wide else 64, SPLITS=splits, HAS_MASK=key_mask is not None,
            PAST_IS_TENSOR=past is not None,
            WIDE=INTERPRETED,  # the interpreter multiplies bf16 wrongly
            num_warps=4, num_stages=1 if wide else 3,
        )  # fmt: skip
    _fuse_kernel[(n + f, batch)](
        projected, gdn_out, sums, parts, tail_or_none, all_heads, weights[9], out, tokens,
        width, channels, capacity, eps,
        N=n, HEADS=f, D=d, BLOCK=block, SPLITS=splits, CHUNK=min(16, splits), W=taps,
        HAS_FA=f > 0, HAS_GDN=n > 0, HAS_TAIL=taps > 1, FA_GATE=fa_gate, GDN_GATE=gdn_gate,
        HAS_NORM=fusion_norm, HAS_GAMMA=has_gamma, PAST_IS_TENSOR=past is not None and f > 0,
        num_warps=4,
    )  # fmt: skip
    return out


WRITTEN = ("tail", "state", "keys", "values")
SCHEMA = """(
    Tensor projected, Tensor? past, SymInt length, Tensor(a!)? tail, Tensor(b!)? state, Tensor(c!)? keys,
    Tensor(d!)? values, Tensor? key_mask, Tensor cos, Tensor sin, Tensor log_scale, Tensor[] tables,
    Tensor[] weights, *, int head_dim, int gdn_heads, int fa_heads, int taps, int b_column, int a_column,
    float eps, bool qk_norm, bool gdn_rotary, bool fa_rotary, bool scaled, bool fa_gate, bool gdn_gate,
    bool fusion_norm, bool has_gamma) -> Tensor"""
"""The arguments of :func:`_launch`. A layer without FA or GDN heads passes None for what it lacks, because a
tensor that is written must not be another argument too."""


def _step(
    projected: torch.Tensor, past: torch.Tensor | None, length: int,
    tail: torch.Tensor | None, state: torch.Tensor | None,
    keys: torch.Tensor | None, values: torch.Tensor | None, key_mask: torch.Tensor | None,
    cos: torch.Tensor, sin: torch.Tensor, log_scale: torch.Tensor, *rest: Any, **settings: Any,
) -> torch.Tensor:  # fmt: skip
    """:func:`_launch` on the operator's arguments, whose rows inductor may have padded."""
    if not all(x is None or x.is_contiguous() for x in (tail, state, keys, values)):
        raise ValueError("a compiled step got a cache that is not contiguous")
    mask = None if key_mask is None else key_mask.contiguous()
    cos, sin, log_scale = cos.contiguous(), sin.contiguous(), log_scale.contiguous()
    with _device_of(projected):
        return _launch(
            projected.contiguous(), past, length, tail, state, keys, values, mask,
            cos, sin, log_scale, *rest, **settings,
        )  # fmt: skip


def _shape_of_step(
    projected: torch.Tensor, *_: Any, head_dim: int, gdn_heads: int, fa_heads: int, **__: Any
) -> torch.Tensor:
    return projected.new_empty(projected.shape[0], 1, (gdn_heads + fa_heads) * head_dim)


def _registered() -> Any:
    """Return the operator by which compiled code runs :func:`_launch`; register it if it is new.

    torch.compile does not look inside an operator, and is told what the operator writes. Without it, inductor
    itself finds out what a Triton kernel writes. A layer without FA heads passes its projection in place of
    keys and values, so inductor copied the projection for the next kernel. But it had also padded the rows of
    the projection (1,552 columns to 1,568), and copied the elements as if without gaps. So every row after
    the first was shifted (torch 2.11).

    An operator stays for the life of the process, which can load several exports. So its name has a hash of
    this file: equal files share an operator, others have their own.
    """
    name = f"decode_heads_{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}"
    if not hasattr(torch.ops.hydrahead, name):
        operator = torch.library.custom_op(
            f"hydrahead::{name}", _step, mutates_args=WRITTEN, schema=SCHEMA
        )
        operator.register_fake(_shape_of_step)
    return getattr(torch.ops.hydrahead, name).default


_OPERATOR: Any = None if triton is None else _registered()
