"""The gates of the delta rule by one launch each way; twin:
:func:`megatron_hydra.ops.delta_rule_gates.delta_rule_gates`.

As separate operators they are eight launches forward and a dozen backward, on tensors of a few numbers per
token. A program has all heads of a block of tokens. Everything between load and store is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_hydra.ops.integers import cdiv, next_power_of_2

ELEMENTS, WARPS = 1024, 4
"""Elements of a program's block, tokens times heads."""
MOST_PROGRAMS = 512
"""Largest number of programs of a backward: each writes a partial sum of the parameters' gradients."""


@triton.jit
def _softplus(x):
    """log(1 + eˣ); below −2.8 by its series, because rounding of 1 + eˣ would lose the result."""
    u = tl.exp(tl.minimum(x, 20.0))
    series = u * (1 - u * (1 / 2 - u * (1 / 3 - u * (1 / 4 - u * (1 / 5 - u / 6)))))
    return tl.where(x > 20.0, x, tl.where(u < 0.06, series, tl.log(1.0 + u)))


@triton.jit(do_not_specialize=["tokens", "heads"])  # steps and layers have different values
def _forward_kernel(
    a, b, a_log, dt_bias, log_alpha, beta, tokens, heads, a_t, b_t,
    TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    h = tl.arange(0, HEADS)
    mask = (t < tokens)[:, None] & (h < heads)[None, :]
    rate = tl.exp(tl.load(a_log + h, h < heads, 0.0).to(tl.float32))
    bias = tl.load(dt_bias + h, h < heads, 0.0).to(tl.float32)
    x = tl.load(a + (t * a_t)[:, None] + h[None, :], mask, 0.0).to(tl.float32) + bias[None, :]
    y = tl.load(b + (t * b_t)[:, None] + h[None, :], mask, 0.0).to(tl.float32)
    own = (t * heads)[:, None] + h[None, :]
    tl.store(log_alpha + own, -rate[None, :] * _softplus(x), mask)
    tl.store(beta + own, tl.sigmoid(y), mask)


@triton.jit(do_not_specialize=["tokens", "heads"])
def _backward_kernel(
    a, b, a_log, dt_bias, d_log_alpha, d_beta, d_a, d_b, partial, tokens, heads, a_t, b_t,
    TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, HEADS)
    inside = h < heads
    rate = tl.exp(tl.load(a_log + h, inside, 0.0).to(tl.float32))
    bias = tl.load(dt_bias + h, inside, 0.0).to(tl.float32)
    by_a_log, by_bias = tl.zeros([HEADS], tl.float32), tl.zeros([HEADS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, TOKENS), tl.num_programs(0)):
        t = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        mask = (t < tokens)[:, None] & inside[None, :]
        own = (t * heads)[:, None] + h[None, :]
        x = tl.load(a + (t * a_t)[:, None] + h[None, :], mask, 0.0).to(tl.float32) + bias[None, :]
        s = tl.sigmoid(tl.load(b + (t * b_t)[:, None] + h[None, :], mask, 0.0).to(tl.float32))
        by_dt = -rate[None, :] * tl.load(d_log_alpha + own, mask, 0.0)
        by_x = by_dt * tl.sigmoid(x)
        by_y = tl.load(d_beta + own, mask, 0.0) * s * (1.0 - s)
        tl.store(d_a + own, by_x.to(d_a.dtype.element_ty), mask)
        tl.store(d_b + own, by_y.to(d_b.dtype.element_ty), mask)
        by_a_log += tl.sum(by_dt * _softplus(x), 0)
        by_bias += tl.sum(by_x, 0)
    sums = partial + tl.program_id(0) * 2 * heads + h
    tl.store(sums, by_a_log, inside)
    tl.store(sums + heads, by_bias, inside)


def _settings(heads: int) -> dict[str, int]:
    padded = next_power_of_2(heads)
    return {"TOKENS": max(1, ELEMENTS // padded), "HEADS": padded, "num_warps": WARPS}


class _DeltaRuleGates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, heads = a.shape
        log_alpha, beta = torch.empty(2, tokens, heads, dtype=torch.float32, device=a.device)
        settings = _settings(heads)
        _forward_kernel[(cdiv(tokens, settings["TOKENS"]),)](
            a,
            b,
            a_log,
            dt_bias,
            log_alpha,
            beta,
            tokens,
            heads,
            a.stride(0),
            b.stride(0),
            **settings,
        )
        ctx.save_for_backward(a, b, a_log, dt_bias)
        return log_alpha, beta

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_log_alpha: torch.Tensor, d_beta: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        a, b, a_log, dt_bias = ctx.saved_tensors
        tokens, heads = a.shape
        settings = _settings(heads)
        programs = min(cdiv(tokens, settings["TOKENS"]), MOST_PROGRAMS)
        d_a, d_b = torch.empty(2, tokens, heads, dtype=a.dtype, device=a.device)
        partial = torch.empty(programs, 2, heads, dtype=torch.float32, device=a.device)
        _backward_kernel[(programs,)](
            a, b, a_log, dt_bias, d_log_alpha.float().contiguous(), d_beta.float().contiguous(),
            d_a, d_b, partial, tokens, heads, a.stride(0), b.stride(0), **settings,
        )  # fmt: skip
        by_a_log, by_bias = partial.sum(0)
        return d_a, d_b, by_a_log.to(a_log.dtype), by_bias.to(dt_bias.dtype)


def delta_rule_gates(
    a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`megatron_hydra.ops.delta_rule_gates.delta_rule_gates`."""
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    log_alpha, beta = _DeltaRuleGates.apply(a, b, a_log, dt_bias)
    return log_alpha, beta
