"""Lifetimes on the tape against autograd with real tensors."""

from __future__ import annotations

from megatron_hydra.planning.tape import operators as op
from megatron_hydra.planning.tape.tensors import Tape, Tensor

ROW = 100 * 8 * 4


def _leaf(tape: Tape) -> Tensor:
    return tape.leaf(tape.empty((100, 8), 4))[0]


def test_what_nobody_refers_to_is_gone() -> None:
    tape = Tape()
    x = tape.empty((100, 8), 4)
    y = op.unary(tape, x)
    assert tape.live == 2 * ROW
    del x
    assert tape.live == ROW
    del y
    assert (tape.live, tape.peak) == (0, 2 * ROW)


def test_a_node_keeps_what_it_saved_until_its_backward() -> None:
    tape = Tape()
    x = _leaf(tape)
    y = op.square(tape, x)  # saves x
    z = op.unary(tape, y)  # saves nothing, so y is freed
    del x, y
    assert tape.live == 2 * ROW  # x, z
    root = Tensor(None, z.shape, z.size, z.edge)
    del z
    gradient = tape.empty((100, 8), 4)
    roots = [(root, gradient)]
    del gradient
    tape.backward(roots)
    assert tape.live == ROW  # the gradient by x, which its leaf keeps


def test_gradients_that_meet_are_summed_in_place_where_they_can() -> None:
    tape = Tape()
    x = _leaf(tape)
    once = op.add(tape, op.unary(tape, x), op.unary(tape, x))
    before = tape.live
    tape.reset_peak()
    tape.backward([(once, tape.empty((100, 8), 4))])
    # The gradient, and one for each branch; the second is added to the first.
    assert tape.peak - before <= 3 * ROW


def test_views_share_bytes_and_their_split_joins_gradients() -> None:
    tape = Tape()
    x = _leaf(tape)
    left, right = op.split(tape, x, [(100, 4), (100, 4)])
    assert tape.live == ROW
    assert left.storage is right.storage


def test_recomputation_keeps_the_input_only_and_counts_its_work_apart() -> None:
    tape = Tape()
    x = _leaf(tape)
    weight = tape.weight((8, 8), 4)

    def run(x: Tensor) -> list[Tensor]:
        for _ in range(5):
            x = op.square(tape, op.linear(tape, x, weight))
        return [x]

    (out,) = op.checkpoint(tape, run, [x])
    assert tape.live == 2 * ROW  # x, out
    tape.backward([(out, tape.empty((100, 8), 4))])
    flops = dict.fromkeys(("forward", "recompute", "backward"), 0.0)
    for work in tape.work:
        flops[work.phase] += work.flops
    one = 5 * 2.0 * 100 * 8 * 8
    assert flops == {"forward": one, "recompute": one, "backward": 2 * one}


def test_a_constant_needs_no_gradient_and_keeps_nothing() -> None:
    tape = Tape()
    x = tape.empty((100, 8), 4)
    y = op.square(tape, x)
    del x
    assert tape.live == ROW
    assert not y.needs_grad
