"""Heads on tensor-parallel ranks."""

from __future__ import annotations

import random

import pytest

from megatron_hydra.serving.vllm.placement import place_heads


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_every_head_once_and_groups_whole(tp_size, kv_heads):
    rng = random.Random(tp_size * 10 + kv_heads)
    maps = [sorted(rng.sample(range(8), rng.randint(0, 8))) for _ in range(20)]
    for layer, ranks in zip(maps, place_heads(maps, 8, kv_heads, tp_size), strict=True):
        assert sorted(h for r in ranks for h in (*r.fa, *r.gdn)) == list(range(8))
        assert sorted(h for r in ranks for h in r.fa) == layer
        groups = [{h * kv_heads // 8 for h in g} for r in ranks for g in r.fa_groups]
        assert all(len(group) == 1 for group in groups)
        assert len(groups) == len({g for group in groups for g in group})
        slots = [len(r.fa_groups) for r in ranks]
        assert max(slots) == -(-len(groups) // tp_size)  # the number that all ranks reserve


def test_full_attention_is_balanced_over_the_layers():
    """With one group in each layer, no layer is balanced, but the model is."""
    maps = [[layer % 16] for layer in range(28)]
    placement = place_heads(maps, 16, 8, 4)
    counts = [sum(len(layer[rank].fa) for layer in placement) for rank in range(4)]
    assert counts == [7, 7, 7, 7]


def test_heads_are_as_even_as_groups_allow():
    (layer,) = place_heads([[0, 1, 2, 3, 8]], 16, 4, 4)
    assert [len(r.fa) + len(r.gdn) for r in layer] == [4, 4, 4, 4]
    (layer,) = place_heads([list(range(8))], 16, 2, 4)  # one group of eight FA heads
    assert sorted(len(r.fa) + len(r.gdn) for r in layer) == [2, 3, 3, 8]
