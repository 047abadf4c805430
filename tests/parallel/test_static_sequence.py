"""Documents as data: resets inside rows keep states apart as boundaries do."""

from __future__ import annotations

import pytest
import torch

from megatron_hydra.ops.gated_delta_rule import chunked_gated_delta_rule
from megatron_hydra.parallel.packed_sequence import PackedSequence
from megatron_hydra.parallel.static_sequence import StaticSequence, fitting
from tests.ops.test_gated_delta_rule import slow_inputs

DOCUMENTS = (0, 1, 2, 3, 40, 64, 70, 128, 191, 192)


@pytest.mark.parametrize("row", [64, 192])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_resets_keep_documents_apart_as_boundaries_do(row, dtype):
    packed = PackedSequence(DOCUMENTS)
    static = fitting(packed, row, None)
    assert static.row == (64 if row == 64 else 192)
    static.load(packed)
    inputs = slow_inputs(192, dtype=dtype)
    q, k, v, log_alpha, beta = inputs
    want, _ = chunked_gated_delta_rule(*inputs, DOCUMENTS)
    emptied = static.emptied(log_alpha)
    got, _ = chunked_gated_delta_rule(q, k, v, emptied, beta, static.local_cu_seqlens)
    cotangent = torch.randn_like(want)
    grads = [torch.autograd.grad(x, inputs, cotangent, retain_graph=True) for x in (want, got)]
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    )
    torch.testing.assert_close(got, want, **tolerance)
    first = torch.tensor(
        DOCUMENTS[:-1]
    )  # their decay meets an empty state: no gradient, whichever way
    for name, a, b in zip(["q", "k", "v", "log_alpha", "beta"], grads[1], grads[0], strict=True):
        if name == "log_alpha":
            assert not b[first].abs().max() > 1e-6
        torch.testing.assert_close(a, b, **tolerance)


def test_what_depends_on_documents_is_filled_anew_in_its_place():
    first, second = PackedSequence((0, 4, 9, 16)), PackedSequence((0, 8, 16))
    static = fitting(first, 8, None)
    assert (static.row, static.room) == (16, 4)
    static.load(first)
    positions = static.positions_local
    doubled = static.cached("doubled", lambda: (positions * 2, positions + 1))
    static.load(second)
    assert torch.equal(static.positions_local, second.positions_local)
    assert torch.equal(doubled[0], second.positions_local * 2)
    assert torch.equal(doubled[1], second.positions_local + 1)
    assert static.cached("doubled", lambda: 1 / 0) is doubled
    block = static.attention_block(0, 16)
    assert block.cu_q.tensor.tolist() == [0, 8, 16, 16, 16]
    assert static.resets.nonzero().flatten().tolist() == [8]


def test_a_sequence_grows_to_what_it_must_hold():
    rows = PackedSequence((0, 8, 16))
    static = fitting(rows, 8, None)
    assert (static.row, static.room) == (8, 0)
    assert static.holds(rows) and not static.holds(PackedSequence((0, 16)))
    packed = PackedSequence((0, 3, 8, 16))
    static = fitting(packed, 8, static)
    assert (static.row, static.room) == (8, 4)
    assert static.holds(rows) and static.holds(packed)
    crossing = PackedSequence((0, 16))
    assert not static.holds(crossing)
    static = fitting(crossing, 8, static)
    assert (static.row, static.room) == (16, 4)
    assert all(static.holds(each) for each in (rows, packed, crossing))
    assert isinstance(static, StaticSequence)
