"""Torch's operators on a tape: what they allocate, save for the backward, multiply and move.

Each follows the derivative formula of the operator of the same name, with its temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from megatron_hydra.planning.tape.tensors import Shape, Storage, Tape, Tensor

WIDE = 4
"""Bytes of fp32."""


def hold(*tensors: Tensor | None) -> tuple[Storage | None, ...]:
    """The storages that a node keeps for its saved tensors."""
    return tuple(None if x is None else x.storage for x in tensors)


def view(tape: Tape, x: Tensor, shape: Shape) -> Tensor:
    """Another shape on the same storage; also a slice, but without its backward."""
    out = Tensor(x.storage, shape, x.size)
    tape.record([x], [out], lambda grads: [_reshaped(grads[0], x_shape)])
    x_shape = x.shape
    return out


def _reshaped(gradient: Tensor | None, shape: Shape) -> Tensor | None:
    return None if gradient is None else Tensor(gradient.storage, shape, gradient.size)


def narrow(tape: Tape, x: Tensor, shape: Shape) -> Tensor:
    """A part of ``x``; its backward fills a tensor of the whole shape."""
    out = Tensor(x.storage, shape, x.size)
    whole, size = x.shape, x.size

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        out = tape.empty(whole, size)
        tape.touch(out, grads[0], launches=2)  # filled with zeros, then written
        return [out]

    tape.record([x], [out], backward)
    return out


def split(tape: Tape, x: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Parts that together are the whole of ``x``; the backward joins their gradients."""
    outs = [Tensor(x.storage, shape, x.size) for shape in shapes]
    whole, size = x.shape, x.size

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        missing = [
            tape.empty(shape, size)
            for shape, g in zip(shapes, grads, strict=True)
            if g is None and 0 not in shape
        ]
        out = tape.empty(whole, size)
        tape.touch(out, *grads, launches=1 + len(missing))
        del missing
        return [out]

    tape.record([x], outs, backward)
    return outs


def cat(tape: Tape, parts: Sequence[Tensor], shape: Shape) -> Tensor:
    """Parts joined into a new tensor; gradients are views."""
    out = tape.empty(shape, parts[0].size)
    tape.touch(out, out)
    shapes = [x.shape for x in parts]
    tape.record(list(parts), [out], lambda grads: [_reshaped(grads[0], part) for part in shapes])
    return out


def copy(tape: Tape, x: Tensor, size: int | None = None, shape: Shape | None = None) -> Tensor:
    """A copy in another type or layout; the gradient is converted back."""
    out = tape.empty(shape or x.shape, size or x.size)
    tape.touch(x, out)
    source_size, source_shape = x.size, x.shape

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        gradient = grads[0]
        assert gradient is not None
        if gradient.size == source_size:
            return [_reshaped(gradient, source_shape)]
        out = tape.empty(source_shape, source_size)
        tape.touch(gradient, out)
        return [out]

    tape.record([x], [out], backward)
    return out


def cast(tape: Tape, x: Tensor, size: int) -> Tensor:
    """``x.to(dtype)``: ``x`` itself if it has this type."""
    return x if x.size == size else copy(tape, x, size)


def unary(
    tape: Tape,
    x: Tensor,
    save: str = "",
    temporaries: int = 0,
    shape: Shape | None = None,
    same_gradient: bool = False,
    launches: tuple[float, float] = (1, 1),
) -> Tensor:
    """An elementwise operator of one argument, or a reduction to ``shape``.

    Args:
        save: ``in``, ``out`` or nothing.
        temporaries: tensors of the gradient's size that its formula needs.
        same_gradient: whether the gradient passes unchanged.
        launches: of forward and backward, without temporaries.
    """
    out = tape.empty(shape or x.shape, x.size)
    tape.touch(x, out, launches=launches[0])
    saved = hold(x if save == "in" else out if save == "out" else None)
    x_shape, size = x.shape, x.size

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        if same_gradient:
            return [_reshaped(grads[0], x_shape)]
        held = [tape.empty(x_shape, size) for _ in range(temporaries)]
        result = tape.empty(x_shape, size)
        again = [result] if saved[0] is not None else []
        tape.touch(grads[0], result, *again, launches=launches[1])
        for temporary in held:
            tape.touch(temporary, temporary)
        del held
        return [result]

    tape.record([x], [out], backward)
    return out


def rsqrt(tape: Tape, x: Tensor) -> Tensor:
    """``(x + ε).rsqrt()``; its formula has a power and two products."""
    return unary(tape, x, save="out", launches=(2, 3))


def square(tape: Tape, x: Tensor) -> Tensor:
    """``x.square()``: a power, whose gradient needs two temporaries."""
    return unary(tape, x, save="in", temporaries=2)


def multiply(tape: Tape, a: Tensor, b: Tensor, size: int | None = None) -> Tensor:
    """``a * b``; the smaller one is broadcast."""
    whole = a if a.numel >= b.numel else b
    out = tape.empty(whole.shape, size or max(a.size, b.size))
    tape.touch(a, b, out)
    needs = (a.needs_grad, b.needs_grad)
    saved = (*hold(b if needs[0] else None), *hold(a if needs[1] else None))
    shapes, sizes, out_shape = (a.shape, b.shape), (a.size, b.size), out.shape

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        gradient = grads[0]
        assert gradient is not None
        assert saved is not None
        results: list[Tensor | None] = []
        for wanted in needs:
            results.append(tape.empty(out_shape, gradient.size) if wanted else None)
            if wanted:
                tape.touch(gradient, gradient, results[-1])
        for i, wanted in enumerate(needs):
            if wanted:
                results[i] = _fitted(tape, results[i], shapes[i], sizes[i])
        return results

    tape.record([a, b], [out], backward)
    return out


def _fitted(tape: Tape, x: Tensor | None, shape: Shape, size: int) -> Tensor | None:
    """A gradient, summed to its tensor's shape and converted to its type."""
    assert x is not None
    if math.prod(shape) == x.numel and size == x.size:
        return _reshaped(x, shape)
    if math.prod(shape) == x.numel:
        out = tape.empty(shape, size)
    else:
        summed = tape.empty(shape, x.size)
        out = summed if size == x.size else tape.empty(shape, size)
    tape.touch(x, out)
    return out


def add(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    """``a + b``: saves nothing; the gradient passes unchanged (summed for a broadcast tensor)."""
    whole = a if a.numel >= b.numel else b
    out = tape.empty(whole.shape, max(a.size, b.size))
    tape.touch(a, b, out)
    shapes, sizes = (a.shape, b.shape), (a.size, b.size)

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        return [
            _fitted(tape, grads[0], shape, size) for shape, size in zip(shapes, sizes, strict=True)
        ]

    tape.record([a, b], [out], backward)
    return out


def matmul(
    tape: Tape,
    a: Tensor,
    b: Tensor,
    shape: Shape,
    inner: int,
    *,
    unit: str = "matmul",
    plus: Tensor | None = None,
    launches: float = 1.0,
) -> Tensor:
    """``a @ b`` (batched), or ``plus + a @ b``: result of ``shape``, with ``inner`` products for each number.

    Args:
        launches: number of products that this call describes.
    """
    out = tape.empty(shape, a.size)
    flops = 2.0 * out.numel * inner
    tape.compute(unit, flops, a.nbytes + b.nbytes + out.nbytes, launches=launches)
    needs = (a.needs_grad, b.needs_grad)
    saved = (*hold(b if needs[0] else None), *hold(a if needs[1] else None))
    shapes, size, moved = (a.shape, b.shape), a.size, a.nbytes + b.nbytes + out.nbytes

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        assert saved is not None
        results: list[Tensor | None] = [_reshaped(grads[0], plus_shape) if plus_shape else None]
        for wanted, shape in zip(needs, shapes, strict=True):
            results.append(tape.empty(shape, size) if wanted else None)
            if wanted:
                tape.compute(unit, flops, moved, launches=launches)
        return results

    plus_shape = () if plus is None else plus.shape  # not the tensor: its values are not saved
    tape.record([plus, a, b], [out], backward)
    return out


def linear(tape: Tape, x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear``: ``[T, i]`` by ``[o, i]``."""
    out_rows, inner = weight.shape
    return matmul(tape, x, weight, (x.shape[0], out_rows), inner)


def checkpoint(
    tape: Tape, run: Callable[..., list[Tensor]], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Run without a graph, keep the inputs, and run again in the backward."""
    if not tape.recording:
        return run(*inputs)
    with tape.grad_mode(False):
        outs = run(*inputs)
    kept = [(Tensor(x.storage, x.shape, x.size), x.needs_grad) for x in inputs]

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        leaves = [tape.leaf(x) if needed else (x, []) for x, needed in kept]
        kept.clear()
        with tape.grad_mode(True), tape.during("recompute"):
            again = run(*(leaf for leaf, _ in leaves))
        roots = [(out, g) for out, g in zip(again, grads, strict=True) if g is not None]
        grads.clear()
        del again
        found = [gradient for _, gradient in leaves]
        del leaves
        tape.backward(roots)
        return [g[0] if g else None for g in found]

    tape.record(list(inputs), outs, backward)
    return outs


def fused(
    tape: Tape,
    inputs: Sequence[Tensor | None],
    out: tuple[Shape, int],
    *,
    save: Sequence[Tensor | None] = (),
    keep: int = 0,
    keep_output: bool = False,
    forward_bytes: dict[str, int] | None = None,
    backward_bytes: dict[str, int] | None = None,
    work: Sequence[tuple[str, float, float]] = (),
    launches: tuple[float, float] = (1, 1),
    triton: tuple[float, float] = (0, 0),
) -> Tensor:
    """One kernel of many steps, with a backward of its own.

    Args:
        inputs: differentiable tensors; each that needs a gradient gets one.
        out: shape and element size of the result.
        save: tensors that the backward reads.
        keep: bytes made in the forward and kept for the backward.
        keep_output: whether the backward also reads the result.
        forward_bytes, backward_bytes: bytes during the kernel, by part of the model.
        work: ``(unit, forward FLOPs, backward FLOPs)``.
        launches, triton: kernels of forward and backward that torch and that Triton launches.
    """
    result = tape.empty(*out)
    inner, later_inner = sum((forward_bytes or {}).values()), sum((backward_bytes or {}).values())
    during = _inside(tape, forward_bytes)
    del during
    read = sum(x.nbytes for x in inputs if x is not None)
    moved = read + result.nbytes + keep + 2.0 * inner
    _note(tape, [(unit, flops) for unit, flops, _ in work], moved, launches[0], triton[0])
    kept = Storage(tape, keep) if keep and tape.recording else None
    saved = [*hold(*save, result if keep_output else None), kept]
    del kept
    wanted = [None if x is None or not x.needs_grad else (x.shape, x.size) for x in inputs]
    later = 2.0 * read + result.nbytes + keep + 2.0 * later_inner

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        inside = _inside(tape, backward_bytes)
        results = [None if want is None else tape.empty(*want) for want in wanted]
        _note(tape, [(unit, flops) for unit, _, flops in work], later, launches[1], triton[1])
        del inside
        saved.clear()
        return list(results)

    tape.record(list(inputs), [result], backward)
    return result


def _inside(tape: Tape, parts: dict[str, int] | None) -> list[Storage]:
    """Storages within a kernel, each with its part."""
    held = []
    for part, count in (parts or {}).items():
        with tape.inside(part):
            held.append(Storage(tape, count))
    return held


def _note(
    tape: Tape, work: list[tuple[str, float]], moved: float, launches: float, triton: float
) -> None:
    """A kernel's work by unit; the first unit has its traffic and launches."""
    for position, (unit, flops) in enumerate(work or [("memory", 0.0)]):
        if position:
            tape.compute(unit, flops, 0.0, launches=0.0)
        else:
            tape.compute(unit, flops, moved, launches=launches, triton=triton)
