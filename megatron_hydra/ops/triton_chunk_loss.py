"""Triton kernels of a chunk's KL and cross-entropy; twin: ``linear_distillation_loss._chunk_loss``.

The logits of a chunk are read twice, and the only tensor of their size that is written is the gradient. One
pass computes each row's statistics online (running maximum; sums are rescaled when it grows). The second pass
computes the gradient from them. The twin makes about thirty passes over the same memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_hydra.ops.integers import cdiv, next_power_of_2

BLOCK, WARPS = 4096, 8
"""Columns of a step and warps of a program: 64 bytes of each tensor per thread in fp32."""

GRADIENT_STEPS = 8
"""Column blocks of one program of the gradient pass."""

STATISTICS = 7
"""Rows of the statistics: student maximum, Σ e^{z−m}, label's logit, Σ e^{(z−m)/τ}; teacher maximum,
Σ e^{(z'−m')/τ}, Σ e^{(z'−m')/τ}·(z'−z)/τ."""


@triton.jit
def _statistics_kernel(
    student, teacher, labels, statistics, columns, rows, s_row, t_row, inverse_tau,
    BLOCK: tl.constexpr, HAS_TEACHER: tl.constexpr, TAU_IS_ONE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    s_peak = tl.full([], -float("inf"), tl.float32)
    t_peak = tl.full([], -float("inf"), tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    s_sum_tau = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        c = start + lanes
        inside = c < columns
        s = tl.load(student + row * s_row + c, inside, -float("inf")).to(tl.float32)
        peak = tl.maximum(s_peak, tl.max(s, 0))
        s_sum = s_sum * tl.exp(s_peak - peak) + tl.exp(s - peak)
        if HAS_TEACHER and not TAU_IS_ONE:
            decay = tl.exp((s_peak - peak) * inverse_tau)
            s_sum_tau = s_sum_tau * decay + tl.exp((s - peak) * inverse_tau)
        s_peak = peak
        if HAS_TEACHER:
            t = tl.load(teacher + row * t_row + c, inside, -float("inf")).to(tl.float32)
            peak_t = tl.maximum(t_peak, tl.max(t, 0))
            decay_t = tl.exp((t_peak - peak_t) * inverse_tau)
            p = tl.exp((t - peak_t) * inverse_tau)
            gap = tl.where(inside, (t - s) * inverse_tau, 0.0)
            t_sum = t_sum * decay_t + p
            cross = cross * decay_t + p * gap
            t_peak = peak_t
    label = tl.load(labels + row)
    local = (label >= 0) & (label < columns)
    target = tl.load(student + row * s_row + label, local, 0.0).to(tl.float32)
    total = tl.sum(s_sum, 0)
    tl.store(statistics + row, s_peak)
    tl.store(statistics + rows + row, total)
    tl.store(statistics + 2 * rows + row, target)
    if HAS_TEACHER:
        if not TAU_IS_ONE:
            total = tl.sum(s_sum_tau, 0)
        tl.store(statistics + 3 * rows + row, total)
        tl.store(statistics + 4 * rows + row, t_peak)
        tl.store(statistics + 5 * rows + row, tl.sum(t_sum, 0))
        tl.store(statistics + 6 * rows + row, tl.sum(cross, 0))


@triton.jit
def _gradient_kernel(
    student, teacher, labels, statistics, factors, gradient, columns, rows, s_row, t_row, g_row,
    inverse_tau, BLOCK: tl.constexpr, STEPS: tl.constexpr, HAS_TEACHER: tl.constexpr,
    TAU_IS_ONE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    s_peak = tl.load(statistics + row)
    ce = tl.load(factors + row)  # of the label
    p_factor = tl.load(factors + rows + row)  # of e^{z−m}
    if HAS_TEACHER:
        kl = tl.load(factors + 2 * rows + row)  # of e^{(z−m)/τ}
        q_factor = tl.load(factors + 3 * rows + row)  # of e^{(z'−m')/τ}
        t_peak = tl.load(statistics + 4 * rows + row)
    for step in range(STEPS):
        c = (tl.program_id(1) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = c < columns
        s = tl.load(student + row * s_row + c, inside, 0.0).to(tl.float32) - s_peak
        p = tl.exp(s)
        d = p * p_factor
        if HAS_TEACHER:
            t = tl.load(teacher + row * t_row + c, inside, 0.0).to(tl.float32) - t_peak
            if TAU_IS_ONE:
                d += p * kl
            else:
                d += tl.exp(s * inverse_tau) * kl
            d -= tl.exp(t * inverse_tau) * q_factor
        d -= tl.where(c == label, ce, 0.0)
        tl.store(gradient + row * g_row + c, d.to(gradient.dtype.element_ty), inside)


def chunk_statistics(
    student: torch.Tensor, teacher: torch.Tensor | None, labels_local: torch.Tensor, tau: float
) -> torch.Tensor:
    """Statistics of every row over this rank's part of the vocabulary.

    Args:
        student, teacher: ``[C, V_local]`` logits with contiguous columns.
        labels_local: ``[C]`` int64, outside ``0 … V_local − 1`` where another rank has the label.
        tau: temperature.

    Returns:
        ``[7, C]`` fp32, see :data:`STATISTICS`; without a teacher its rows are zero.
    """
    rows, columns = student.shape
    statistics = torch.zeros(STATISTICS, rows, dtype=torch.float32, device=student.device)
    _statistics_kernel[(rows,)](
        student, teacher, labels_local, statistics, columns, rows, student.stride(0),
        0 if teacher is None else teacher.stride(0), 1.0 / tau, BLOCK=_block(columns),
        HAS_TEACHER=teacher is not None, TAU_IS_ONE=tau == 1, num_warps=WARPS,
    )  # fmt: skip
    return statistics


def chunk_gradient(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels_local: torch.Tensor,
    statistics: torch.Tensor,
    factors: torch.Tensor,
    tau: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient by the logits, ``[C, V_local]`` in ``dtype``; overwrites ``student`` if it has this dtype.

    f₁·e^{z−m} + f₂·e^{(z−m)/τ} − f₃·e^{(z'−m')/τ} − f₀·[column is the label]

    Args:
        student, teacher, labels_local, tau: as :func:`chunk_statistics`.
        statistics: maxima in rows 0 and 4, over the whole vocabulary.
        factors: ``[4, C]`` fp32, f₀ … f₃.
        dtype: of the result.
    """
    rows, columns = student.shape
    # In place: a program reads an element of both logits before it writes it, and no other program reads it.
    gradient = student
    if student.dtype != dtype:
        gradient = torch.empty(rows, columns, dtype=dtype, device=student.device)
    block = _block(columns)
    grid = (rows, cdiv(columns, block * GRADIENT_STEPS))
    _gradient_kernel[grid](
        student, teacher, labels_local, statistics, factors, gradient, columns, rows,
        student.stride(0), 0 if teacher is None else teacher.stride(0), gradient.stride(0),
        1.0 / tau, BLOCK=block, STEPS=GRADIENT_STEPS, HAS_TEACHER=teacher is not None,
        TAU_IS_ONE=tau == 1, num_warps=WARPS,
    )  # fmt: skip
    return gradient


def _block(columns: int) -> int:
    return min(BLOCK, max(16, next_power_of_2(columns)))
