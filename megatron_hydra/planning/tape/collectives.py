"""Megatron-Core's parallel linears and this package's own exchanges, on a tape."""

from __future__ import annotations

from megatron_hydra.planning.tape import operators as op
from megatron_hydra.planning.tape.rank import Program
from megatron_hydra.planning.tape.tensors import Storage, Tensor


def summed_copy(program: Program, nbytes: int) -> Storage | None:
    """Gloo sums a copy of the whole input before it scatters; NCCL needs no copy."""
    return None if program.rank.gpu else Storage(program.tape, nbytes)


def column_linear(program: Program, x: Tensor, weight: Tensor) -> Tensor:
    """Megatron's column-parallel linear: input ``[rows, i]``, output ``[tokens, o]``."""
    tape, rank = program.tape, program.rank
    out_rows, inner = weight.shape
    tokens, tp, sequence = rank.tokens, rank.tp, rank.run.parallel.sequence
    whole = tokens * inner * x.size
    flops = 2.0 * tokens * inner * out_rows
    moved = float(whole + (tokens + inner) * out_rows * x.size)
    if sequence:
        tape.send("sequence", "tensor", whole * (tp - 1) / tp)
    out = tape.empty((tokens, out_rows), x.size)
    tape.compute("matmul", flops, moved)
    saved = list(op.hold(x))
    x_shape, size, wants = x.shape, x.size, (x.needs_grad, weight.needs_grad)

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        if sequence:
            tape.send("sequence", "tensor", whole * (tp - 1) / tp)
        d_input = tape.empty((tokens, inner), size)
        tape.compute("matmul", flops, moved)
        if sequence:
            scattered = tape.empty(x_shape, size)
            in_flight = summed_copy(program, whole)
            tape.send("sequence", "tensor", whole * (tp - 1) / tp)
        elif tp > 1:
            tape.send("tensor", "tensor", 2.0 * whole * (tp - 1) / tp)
        d_weight = tape.empty((out_rows, inner), size)
        tape.compute("matmul", flops, moved)
        result = scattered if sequence else d_input
        saved.clear()
        if sequence:
            del in_flight
        return [result if wants[0] else None, d_weight if wants[1] else None]

    tape.record([x, weight], [out], backward)
    return out


def row_linear(program: Program, x: Tensor, weight: Tensor) -> Tensor:
    """Megatron's row-parallel linear: input ``[tokens, i]``, output ``[rows, o]``, summed."""
    tape, rank = program.tape, program.rank
    tp, size, out_rows = rank.tp, x.size, weight.shape[0]
    partial = op.linear(tape, x, weight)
    if tp == 1:
        return partial
    whole = partial.nbytes
    if not rank.run.parallel.sequence:
        tape.send("tensor", "tensor", 2.0 * whole * (tp - 1) / tp)
        return partial
    out = tape.empty((rank.rows, out_rows), size)
    summed_copy(program, whole)
    tape.send("sequence", "tensor", whole * (tp - 1) / tp)
    shape = partial.shape

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        tape.send("sequence", "tensor", whole * (tp - 1) / tp)
        return [tape.empty(shape, size)]

    tape.record([partial], [out], backward)
    return out


def gather_sequence(
    program: Program, x: Tensor, axis: str, kind: str, ranks: int | None = None
) -> Tensor:
    """All ranks' shards one after the other; the backward sums and scatters."""
    tape = program.tape
    count = program.rank.tp if ranks is None else ranks
    if count == 1:
        return x
    local, size = x.shape, x.size
    out = tape.empty((local[0] * count, *local[1:]), size)
    tape.send(kind, axis, x.nbytes * (count - 1.0))

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        result = tape.empty(local, size)
        summed_copy(program, result.nbytes * count)
        tape.send(kind, axis, result.nbytes * (count - 1.0))
        return [result]

    tape.record([x], [out], backward)
    return out


def swap(program: Program, x: Tensor, axis: str) -> Tensor:
    """Exchange with the mirror rank."""
    tape = program.tape
    shape, size, nbytes = x.shape, x.size, x.nbytes
    out = tape.empty(shape, size)
    tape.send("query_swap", axis, float(nbytes))

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        tape.send("query_swap", axis, float(nbytes))
        return [tape.empty(shape, size)]

    tape.record([x], [out], backward)
    return out
