"""The partition of heads: each head on one rank, equal numbers, whole KV groups if possible."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.parallel.head_partition import plan_layer, plan_model, shared_groups


@st.composite
def layers(draw):
    groups = draw(st.integers(1, 8))
    size = draw(st.integers(1, 4))
    heads = groups * size
    fa = draw(st.sets(st.integers(0, heads - 1)))
    tp = draw(st.integers(1, heads))
    return sorted(fa), heads, groups, tp


@given(layers())
@settings(deadline=None)
def test_heads_partition_is_exact_and_even(case):
    fa, heads, groups, tp = case
    plan = plan_layer(3, fa, heads, groups, tp, "heads")
    assert sorted(h for rank in plan.fa for h in rank) == fa
    assert sorted(h for rank in (*plan.fa, *plan.gdn) for h in rank) == list(range(heads))
    totals = [len(a) + len(b) for a, b in zip(plan.fa, plan.gdn, strict=True)]
    assert max(totals) - min(totals) <= 1
    counts = [len(rank) for rank in plan.fa]
    assert max(counts) - min(counts) <= 1
    assert max(counts) == -(-len(fa) // tp)  # the minimum for whole heads


@given(layers())
@settings(deadline=None)
def test_sequence_partition_gives_every_rank_all_fa_heads(case):
    fa, heads, groups, tp = case
    plan = plan_layer(0, fa, heads, groups, tp, "sequence")
    assert all(list(rank) == fa for rank in plan.fa)
    assert sorted(h for rank in plan.gdn for h in rank) == sorted(set(range(heads)) - set(fa))
    counts = [len(rank) for rank in plan.gdn]
    assert max(counts) - min(counts) <= 1


def test_whole_groups_stay_on_one_rank_when_they_fit():
    plan = plan_layer(0, range(16), 16, 8, 8, "heads")
    assert plan.fa == tuple((2 * r, 2 * r + 1) for r in range(8))
    # two pairs and two single heads over two ranks: no pair is split
    plan = plan_layer(0, [0, 1, 4, 6, 10, 11], 16, 8, 2, "heads")
    group_of = {h: h // 2 for h in range(16)}
    assert shared_groups(plan.fa, group_of) == ()
    assert [len(rank) for rank in plan.fa] == [3, 3]


def test_more_ranks_than_kv_heads_share_groups():
    plan = plan_layer(0, range(8), 8, 2, 4, "heads")
    group_of = {h: h // 4 for h in range(8)}
    assert shared_groups(plan.fa, group_of) == (0, 1)
    assert [len(rank) for rank in plan.fa] == [2, 2, 2, 2]


def test_more_ranks_than_heads_is_refused_by_layer():
    with pytest.raises(HydraError, match=r"layer 7: 4 query heads .*parallel\.tensor=8"):
        plan_layer(7, [0], 4, 2, 8, "heads")


def test_plan_does_not_depend_on_the_order_of_the_map():
    fa = [0, 3, 4, 9, 12]
    shuffled = random.Random(0).sample(fa, len(fa))
    assert plan_layer(0, fa, 16, 8, 4, "heads") == plan_layer(0, shuffled, 16, 8, 4, "heads")


def test_heads_that_are_both_are_dealt_once_and_by_heads_only():
    model = ModelConfig(
        family="qwen3", num_layers=2, hidden_size=48, ffn_hidden_size=80, vocab_size=64,
        num_query_heads=6, num_kv_heads=2, head_dim=16, hydra=HydraConfig(mixer="token"),
        full_attention_heads=(tuple(range(6)),) * 2,
    )  # fmt: skip
    for plan in plan_model(model, 4, "heads"):
        assert plan.fa == plan.gdn
        assert sorted(h for rank in plan.fa for h in rank) == list(range(6))
        assert [len(rank) for rank in plan.fa] == [2, 2, 1, 1]
    with pytest.raises(HydraError, match=r"fa_partition=sequence .*hydra\.mixer=token"):
        plan_model(model, 2, "sequence")
    assert plan_model(model, 1, "sequence")[0].mode == "heads"
