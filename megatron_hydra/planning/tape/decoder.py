"""Megatron-Core's decoder on a tape: layers, embedding, final norm, loss."""

from __future__ import annotations

import math

from megatron_hydra.model.local_heads import LocalHeads
from megatron_hydra.planning.tape import operators as op
from megatron_hydra.planning.tape.attention import Attention
from megatron_hydra.planning.tape.collectives import (
    column_linear,
    gather_sequence,
    row_linear,
    summed_copy,
)
from megatron_hydra.planning.tape.preparation import rms_norm
from megatron_hydra.planning.tape.rank import Program
from megatron_hydra.planning.tape.tensors import Tensor

LOSS_LAUNCHES = {(True, 1): (17, 2), (True, 2): (33, 2), (False, 1): (24, 0), (False, 2): (43, 0)}
"""(GPU, number of models whose logits are read) -> kernels of torch and Triton for a chunk of the loss, without
products (``ops.linear_distillation_loss``)."""


def norm(program: Program, x: Tensor) -> Tensor:
    """RMSNorm over the residual stream: torch's fused kernel on a GPU, else step by step."""
    tape = program.tape
    with tape.inside("norms"):
        weight = tape.weight((1, x.shape[-1]), x.size, program.trained)
        if program.rank.gpu:
            return op.fused(
                tape, [x, weight], (x.shape, x.size), save=[x], keep=x.shape[0] * op.WIDE,
                launches=(1, 2),
            )  # fmt: skip
        return rms_norm(program, x, weight)


def residual(program: Program, x: Tensor, y: Tensor) -> Tensor:
    """``x + y``; a model that is not trained adds in place."""
    tape = program.tape
    with tape.inside("residual"):
        if not program.trained:
            tape.touch(x, y, y)
            return y
        return op.add(tape, x, y)


def mlp(program: Program, x: Tensor) -> Tensor:
    """SwiGLU."""
    tape, rank, model = program.tape, program.rank, program.model
    ffn, hidden = model.ffn_hidden_size // rank.tp, model.hidden_size

    def run(x: Tensor) -> list[Tensor]:
        both = column_linear(program, x, tape.weight((2 * ffn, hidden), x.size, program.trained))
        half = (both.shape[0], ffn)
        if rank.gpu:
            product = op.fused(  # torch compiles it into one Triton kernel for each direction
                tape, [both], (half, x.size), save=[both], launches=(0, 0), triton=(1, 1)
            )
        else:
            gate, up = op.split(tape, both, [half, half])
            # Megatron adds an offset of zero to the linear half.
            product = op.multiply(
                tape, op.unary(tape, gate, save="in"), op.unary(tape, up, same_gradient=True)
            )
            del gate, up
        weight = tape.weight((hidden, ffn), x.size, program.trained)
        return [row_linear(program, product, weight)]

    recompute = rank.run.recompute
    with tape.inside("mlp"):
        if recompute.granularity == "selective" and "mlp" in recompute.modules:
            return op.checkpoint(tape, run, [x])[0]
        return run(x)[0]


def layer(program: Program, heads: LocalHeads, x: Tensor) -> Tensor:
    """One transformer layer, ``[rows, D]``."""
    normed = norm(program, x)
    attended = Attention(program, heads)(normed)
    x = residual(program, x, attended)
    del normed, attended
    normed = norm(program, x)
    return residual(program, x, mlp(program, normed))


def align_layer(
    teacher: Program, heads: LocalHeads, student: Program, ours: LocalHeads, x: Tensor
) -> Tensor:
    """A layer of the teacher; the student's attention learns from its input and output."""
    tape = student.tape
    with tape.grad_mode(False):
        normed = norm(teacher, x)
        target = Attention(teacher, heads)(normed)
    output = Attention(student, ours)(normed)
    if student.rank.gpu:
        with tape.inside("loss"):  # one kernel for loss and gradient; mask, sum and accumulation
            gradient = tape.like(output)
            tape.compute("memory", 0.0, 3.0 * gradient.nbytes, 0.0, launches=3, triton=1)
        roots = [(output, gradient)]
        del output, gradient
        tape.backward(roots)
        return _after_attention(teacher, x, target)
    with tape.inside("loss"):
        wide = op.cast(tape, output, op.WIDE)
        del output
        against = op.cast(tape, Tensor(target.storage, target.shape, target.size), op.WIDE)
        gap = op.add(tape, wide, against)
        del wide, against
        squared = op.square(tape, gap)
        del gap
        loss = op.unary(tape, squared, shape=(x.shape[0], 1))
        del squared
        gradient = tape.empty(loss.shape, op.WIDE)
    tape.backward([(loss, gradient)])
    del loss, gradient, normed
    return _after_attention(teacher, x, target)


def _after_attention(teacher: Program, x: Tensor, target: Tensor) -> Tensor:
    """The rest of a layer of the frozen teacher."""
    with teacher.tape.grad_mode(False):
        x = residual(teacher, x, target)
        del target
        return residual(teacher, x, mlp(teacher, norm(teacher, x)))


def embedding(program: Program, weight: Tensor) -> Tensor:
    """Token embeddings of this shard, ``[rows, D]``."""
    tape, rank, hidden = program.tape, program.rank, program.model.hidden_size
    table, size = weight.shape, weight.size
    with tape.inside("embedding"):
        found = tape.empty((rank.tokens, hidden), size)
        tape.touch(found, found)

        def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
            result = tape.empty(table, size)
            # On a GPU, tokens are sorted first.
            tape.touch(grads[0], result, launches=8 if rank.gpu else 2)
            return [result]

        tape.record([weight], [found], backward)
        if rank.tp == 1:
            return found
        whole = found.nbytes
        if not rank.run.parallel.sequence:
            tape.send("tensor", "tensor", 2.0 * whole * (rank.tp - 1) / rank.tp)
            return found
        return scatter(program, found)


def scatter(program: Program, x: Tensor) -> Tensor:
    """Sum over tensor-parallel ranks; each rank keeps its slice of the sequence."""
    tape, rank, shape, size = program.tape, program.rank, x.shape, x.size
    out = tape.empty((rank.rows, shape[1]), size)
    sent = x.nbytes * (rank.tp - 1) / rank.tp
    summed_copy(program, x.nbytes)
    tape.send("sequence", "tensor", sent)

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        tape.send("sequence", "tensor", sent)
        return [tape.empty(shape, size)]

    tape.record([x], [out], backward)
    return out


def replicated(program: Program, hidden: Tensor) -> Tensor:
    """Last hidden states of all tokens of the shard."""
    rank = program.rank
    if rank.run.parallel.sequence:
        return gather_sequence(program, hidden, "tensor", "sequence")
    if rank.tp > 1 and hidden.needs_grad:
        rank_bytes = 2.0 * hidden.nbytes * (rank.tp - 1) / rank.tp
        out = Tensor(hidden.storage, hidden.shape, hidden.size)

        def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
            program.tape.send("tensor", "tensor", rank_bytes)
            return [grads[0]]

        program.tape.record([hidden], [out], backward)
        return out
    return hidden


def token_loss(
    program: Program, hidden: Tensor, weight: Tensor, teacher: Tensor | None = None
) -> Tensor:
    """As ``ops.linear_distillation_loss``: gradients are formed in the forward, chunk by chunk."""
    tape, rank, size = program.tape, program.rank, hidden.size
    tokens, width = hidden.shape
    vocabulary = weight.shape[0]
    chunk = min(rank.run.loss.chunk_tokens, tokens)
    chunks = tokens / chunk
    models = 1 if teacher is None else 2
    d_hidden = tape.empty(hidden.shape, size)
    d_weight = tape.empty(weight.shape, op.WIDE)
    # Our kernels read logits in any dtype; the torch passes convert them to fp32.
    narrow_logits = rank.run.loss.logits == "weights" and rank.gpu
    logits = chunk * vocabulary * (size if narrow_logits else op.WIDE)
    rows = chunk * width * size
    product = vocabulary * width * op.WIDE
    flops, converts = 2.0 * chunk * vocabulary * width, size < op.WIDE and not rank.gpu
    wide_rows = 2 * rows if converts else 0
    head = product if converts else 0
    # While logits are computed: the student's, during the teacher's, and inputs in fp32.
    tape.transient((models - 1) * logits, logits, models * rows, wide_rows, head)
    if rank.gpu:
        tape.transient(models * logits, models * rows, chunk * vocabulary * size)
        tape.transient(chunk * vocabulary * size, models * rows, rows)
    else:
        # Logits, exponentials and gradient of every model, and one product before its addition.
        others = (2 if rank.run.loss.temperature == 1 else 3) * logits if teacher is not None else 0
        tape.transient(3 * logits, others, models * rows)
        narrow = logits // 2 if converts else 0
        wide = logits if converts else 0
        tape.transient(logits, narrow, rows, models * rows)
        tape.transient(narrow or logits, wide, wide_rows, product, models * rows)
    times = math.ceil(chunks)
    for _ in range(models):
        moved = (rows + vocabulary * width * size + logits) * chunks
        tape.compute("matmul", flops * chunks, moved, launches=times)
    with tape.during("backward"):
        moved = (rows + logits + product) * chunks
        tape.compute("matmul", flops * chunks, moved, launches=times)
        moved += product * chunks
        tape.compute("matmul", flops * chunks, moved, launches=times)
    small, triton = LOSS_LAUNCHES[rank.gpu, models]
    tape.compute(
        "memory", 0.0, (2.0 if rank.gpu else 8.0) * models * logits * chunks,
        launches=small * times, triton=triton * times,
    )  # fmt: skip
    if rank.tp > 1:
        tape.send("loss", "tensor", 7.0 * tokens * op.WIDE * 2 * (rank.tp - 1) / rank.tp)
    out = tape.empty((), op.WIDE)
    kept, wanted = [d_hidden, d_weight], weight.needs_grad
    del d_hidden, d_weight

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        by_hidden, by_weight = kept
        kept.clear()
        tape.touch(by_hidden, by_hidden, by_weight, by_weight)
        if size != op.WIDE:
            narrow = tape.empty(by_weight.shape, size)
            by_weight = narrow
        return [by_hidden, by_weight if wanted else None]

    tape.record([hidden, weight], [out], backward)
    return out
