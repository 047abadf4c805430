"""Norms, rotary and scale of heads on a tape: ``ops.qk_preparation`` or its GPU kernel."""

from __future__ import annotations

from megatron_hydra.planning.tape import operators as op
from megatron_hydra.planning.tape.rank import Program
from megatron_hydra.planning.tape.tensors import Tensor


def normed(program: Program, wide: Tensor) -> Tensor:
    """X / RMS(x) of an fp32 tensor over its last axis."""
    tape = program.tape
    one = (*wide.shape[:-1], 1)
    mean = op.unary(tape, op.square(tape, wide), shape=one)
    return op.multiply(tape, wide, op.rsqrt(tape, mean))


def rms_norm(program: Program, x: Tensor, weight: Tensor | None) -> Tensor:
    """As ``qk_preparation.rms_norm``."""
    tape = program.tape
    result = op.cast(tape, normed(program, op.cast(tape, x, op.WIDE)), x.size)
    return result if weight is None else op.multiply(tape, result, weight)


def prepare_heads(
    program: Program, x: Tensor, rope: bool, scaled: bool, l2: bool, calls: int = 1
) -> Tensor:
    """As ``qk_preparation.prepare_heads``, or its GPU kernel.

    Args:
        calls: calls of this kernel; 0: the call for other heads also prepares these.
    """
    tape, model = program.tape, program.model
    weight = None
    if model.qk_norm:
        weight = tape.weight((x.shape[-1],), program.rank.size, program.trained)
    if program.rank.gpu:
        if weight is None and not (rope or scaled or l2):
            return x
        # The weight's gradient is a sum of partial gradients.
        sums = 0 if weight is None else 2
        return op.fused(
            tape, [x, weight], (x.shape, x.size), save=[x], launches=(0, sums * calls),
            triton=(calls, calls),
        )  # fmt: skip
    if weight is not None:
        x = rms_norm(program, x, weight)
    if rope:
        x = _rotated(program, x)
    if scaled:
        x = op.cast(tape, _times_table(program, x), x.size)
    if l2:
        size = x.size
        wide = op.cast(tape, x, op.WIDE)
        one = (*wide.shape[:-1], 1)
        total = op.unary(tape, op.square(tape, wide), shape=one, same_gradient=True)
        x = op.cast(tape, op.multiply(tape, wide, op.rsqrt(tape, total)), size)
    return x


def _times_table(program: Program, x: Tensor) -> Tensor:
    """``x`` times an fp32 table that needs no gradient."""
    table = Tensor(None, (1, 1), op.WIDE)
    return op.multiply(program.tape, x, table)


def _rotated(program: Program, x: Tensor) -> Tensor:
    tape = program.tape
    half = (*x.shape[:-1], x.shape[-1] // 2)
    swapped = op.cat(
        tape, [op.unary(tape, op.narrow(tape, x, half)), op.narrow(tape, x, half)], x.shape
    )
    turned = op.add(tape, _times_table(program, x), _times_table(program, swapped))
    return op.cast(tape, turned, x.size)
