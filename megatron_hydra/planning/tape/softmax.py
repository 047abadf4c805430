"""Softmax attention of document segments on a tape: the GPU's kernels or ``ops.varlen_attention``."""

from __future__ import annotations

from megatron_hydra.ops import tail_attention
from megatron_hydra.planning.tape import operators as op
from megatron_hydra.planning.tape.rank import Program
from megatron_hydra.planning.tape.tensors import Tensor


def attend(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[tuple[int, int]],
    window: int | None = None,
) -> Tensor:
    """Causal attention of segments with ``(queries, keys)`` each: GPU kernel or torch twin."""
    tape, n, d = program.tape, q.shape[1], q.shape[2]
    needed = counted = 0.0
    for len_q, len_k in lengths:
        pairs = len_q * (len_k - len_q) + len_q * (len_q + 1) / 2
        dense = len_q * len_k
        if window is not None:
            pairs, dense = min(pairs, len_q * window), min(dense, 2 * window * len_q)
        needed, counted = needed + pairs, counted + dense
    forward = (4.0 * d * n * needed, 4.0 * d * n * counted)
    if program.rank.gpu and window is None and _is_long_tail(q, lengths):
        return _two_products(program, q, k, v, forward[0])
    if program.rank.gpu:
        # cuDNN through SDPA, or flash attention of packed documents behind a Python operator.
        is_dense = window is None and len(set(lengths)) == 1 and lengths[0][0] == lengths[0][1]
        unit = "attention" if is_dense else "varlen_attention"
        softmax = q.shape[0] * n * op.WIDE
        return op.fused(
            tape, [q, k, v], (q.shape, q.size), save=[q, k, v], keep=softmax, keep_output=True,
            # Row sums, and fp32 sums of the gradient by q.
            backward_bytes={"full attention": softmax + 2 * q.nbytes},
            work=[(unit, forward[0], 2.5 * forward[0])],
            launches=(1, 3) if is_dense else (0, 3), triton=(0, 0) if is_dense else (1, 1),
        )  # fmt: skip
    return _torch_attention(program, q, k, v, lengths, forward)


def _is_long_tail(q: Tensor, lengths: list[tuple[int, int]]) -> bool:
    """Whether ``ops.tail_attention`` computes these segments."""
    (len_q, len_k), d = lengths[0], q.shape[2]
    return len(lengths) == 1 and tail_attention.is_suited(len_q, len_k, d) and q.size < op.WIDE


def _two_products(program: Program, q: Tensor, k: Tensor, v: Tensor, flops: float) -> Tensor:
    """As ``ops.tail_attention``: two dense products, joined in fp32."""
    softmax, wide = q.shape[0] * q.shape[1] * op.WIDE, q.numel * op.WIDE
    return op.fused(
        program.tape, [q, k, v], (q.shape, q.size), save=[q, k, v], keep=softmax, keep_output=True,
        # Two outputs, both in fp32, and their mean; log-sum-exps and the shares.
        forward_bytes={"full attention": 2 * q.nbytes + 3 * wide + 3 * softmax},
        # As for one product, and the second gradient by q; those by k and v are joined.
        backward_bytes={"full attention": softmax + 3 * q.nbytes + k.nbytes + v.nbytes},
        work=[("tail_attention", flops, 2.5 * flops)],
        launches=(10, 9),
    )  # fmt: skip


def _torch_attention(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[tuple[int, int]],
    forward: tuple[float, float],
) -> Tensor:
    """As ``varlen_attention``: segments of equal lengths in one call of SDPA."""
    tape, (tokens, n, d) = program.tape, q.shape
    groups = sorted(set(lengths))
    pieces = []
    for len_q, len_k in groups:
        count = lengths.count((len_q, len_k))
        rows, keys, value = q, k, v
        if len(groups) > 1:
            rows = op.copy(tape, op.narrow(tape, q, (count * len_q, n, d)))
            keys = op.copy(tape, op.narrow(tape, k, (count * len_k, *k.shape[1:])))
            value = op.copy(tape, op.narrow(tape, v, (count * len_k, *v.shape[1:])))
        repeats = n // k.shape[1]
        if repeats > 1:
            keys, value = (_repeated(program, x, repeats) for x in (keys, value))
        share = count * len_q * len_k / sum(a * b for a, b in lengths)
        pieces.append(
            _sdpa(
                program, rows, keys, value, len_q, len_k, (forward[0] * share, forward[1] * share)
            )
        )
    return pieces[0] if len(pieces) == 1 else op.cat(tape, pieces, (tokens, n, d))


def _repeated(program: Program, x: Tensor, repeats: int) -> Tensor:
    tape, shape = program.tape, x.shape
    out = tape.empty((shape[0], shape[1] * repeats, shape[2]), x.size)
    tape.touch(x, out)
    size = x.size
    tape.record([x], [out], lambda grads: [tape.empty(shape, size)])
    return out


def _sdpa(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    len_q: int,
    len_k: int,
    flops: tuple[float, float],
) -> Tensor:
    """Torch's flash attention on the CPU."""
    tape = program.tape
    mask = None
    if len_q != len_k:
        allowed = tape.empty((len_q, len_k), 1)
        # SDPA adds a mask of the queries' type and keeps it; the graph keeps the other mask.
        mask = tape.empty((len_q, len_k), q.size)
        del allowed
    out = tape.empty(q.shape, q.size)
    softmax = tape.empty((q.shape[0], q.shape[1]), op.WIDE)
    tape.compute("attention", flops[0], 2.0 * q.nbytes + k.nbytes + v.nbytes, flops[1])
    saved = list(op.hold(q, k, v, out, softmax, mask))
    wanted = [(x.shape, x.size) if x.needs_grad else None for x in (q, k, v)]

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        results = [None if want is None else tape.empty(*want) for want in wanted]
        tape.compute("attention", 2.5 * flops[0], 0.0, 2.5 * flops[1])
        saved.clear()
        return list(results)

    tape.record([q, k, v], [out], backward)
    return out
