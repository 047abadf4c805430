"""Balance of full attention over the ranks that share a sequence, in counted pairs."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_hydra.parallel import context_parallel
from megatron_hydra.parallel.packed_sequence import PackedSequence


def pairs_by_rank(cu: tuple[int, ...], size: int) -> list[int]:
    """The (query, key) pairs that the kernel computes on every rank, from its arguments."""
    packed, counts = PackedSequence(cu), [0] * size

    def attention(q, k, v, cu_q, cu_k):
        for i in range(len(cu_q) - 1):
            queries, keys = cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]
            counts[rank] += queries * (keys - queries) + queries * (queries + 1) // 2
        return q

    def gathered(x, group):
        return x.expand(cu[-1], *x.shape[1:])

    swap = SimpleNamespace(apply=lambda x, group, peer: x)
    x = torch.zeros(1, 1, 1)
    for rank in range(size):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: size)
        with (
            mock.patch.object(context_parallel, "gather_sequence", gathered),
            mock.patch.object(context_parallel, "_Swap", swap),
        ):
            q = x.expand(cu[-1] // size, 1, 1)
            context_parallel.sharded_attention(q, x, x, packed, group, attention)
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
