"""Balance of full attention over the ranks that share a sequence, in counted pairs."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_hydra.parallel import context_parallel
from megatron_hydra.parallel.packed_sequence import PackedSequence


class _Counted(torch.autograd.Function):
    """Attention that only counts, in both directions; its result has the shape of q."""

    @staticmethod
    def forward(ctx, q, k, v, pairs, work):
        ctx.pairs, ctx.work = pairs, work
        work[-1] += pairs
        ctx.shapes = [x.shape for x in (k, v)]
        return q.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.work[-1] += ctx.pairs
        return grad, *(grad.new_zeros(shape) for shape in ctx.shapes), None, None


def work_by_rank(cu: tuple[int, ...], size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Forward and backward: of every rank, the (query, key) pairs of its kernels before, between and after its
    exchanges with its mirror rank."""
    packed, forwards, backwards = PackedSequence(cu), [], []
    x = torch.zeros(1, 1, 1)
    for rank in range(size):
        work = [0]

        def attention(q, k, v, cu_q, cu_k, work=work):
            pairs = 0
            for i in range(len(cu_q) - 1):
                queries, keys = cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]
                pairs += queries * (keys - queries) + queries * (queries + 1) // 2
            return _Counted.apply(q, k, v, pairs, work)

        def exchanged(x, group, to, source, work=work):
            work.append(0)
            return x.clone()

        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: size)
        with (
            mock.patch.object(
                context_parallel, "gather_sequence", lambda x, group: x.expand(cu[-1], *x.shape[1:])
            ),
            mock.patch.object(context_parallel, "_send_receive", exchanged),
        ):
            q = torch.zeros(cu[-1] // size, 1, 1, requires_grad=True)
            out = context_parallel.sharded_attention(q, x, x, packed, group, attention)
            forwards.append(list(work))
            work[:] = [0]
            out.sum().backward()
            backwards.append(list(work))
    return forwards, backwards


def pairs_by_rank(cu: tuple[int, ...], size: int) -> list[int]:
    """The (query, key) pairs that the kernel computes on every rank, from its arguments."""
    forwards, backwards = work_by_rank(cu, size)
    counts = [sum(work) for work in forwards]
    assert counts == [sum(work) for work in backwards]
    return counts


def imbalance(counts: list[int]) -> float:
    """The slowest rank's work divided by the mean."""
    return max(counts) * len(counts) / sum(counts)


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16])
def test_one_document_loads_all_ranks_equally(size: int) -> None:
    length = 512 * size
    counts = pairs_by_rank((0, length), size)
    assert sum(counts) == length * (length + 1) // 2
    assert imbalance(counts) <= 1.02


@pytest.mark.parametrize("size", [2, 4, 8])
def test_no_rank_waits_for_its_mirror_between_two_blocks(size: int) -> None:
    """Ranks meet at every exchange, so the slowest counts between two of them, not only in the sum."""
    length = 512 * size
    for works in work_by_rank((0, length), size):
        assert {len(work) for work in works} == {3}
        time = sum(max(between) for between in zip(*works, strict=True))
        assert time * size <= 1.02 * length * (length + 1) // 2


def test_packed_documents_load_the_ranks_that_hold_them() -> None:
    """The limit: one document of a shard's length among single tokens gives all work to two ranks."""
    size, shard = 8, 512
    cu = (*range(2 * shard + 1), *range(3 * shard, size * shard + 1))
    counts = pairs_by_rank(cu, size)
    assert sum(counts) == shard * (shard + 1) // 2 + (size - 1) * shard
    assert sorted(counts)[-2] > 10 * sorted(counts)[-3]
    assert 5 < imbalance(counts) < 6
    # documents of equal length give every rank its share, whether ranks share them or not
    assert imbalance(pairs_by_rank(tuple(range(0, size * shard + 1, 64)), size)) == 1.0
