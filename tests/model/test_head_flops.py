"""FLOPs of each rank: their sum does not depend on the layout; the balance depends on the partition."""

from __future__ import annotations

import dataclasses
import random

import pytest

from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.model.head_flops import (
    full_attention_flops,
    imbalance,
    rank_loads,
)
from megatron_hydra.ops.linear_rules import gated_delta_net_flops
from megatron_hydra.parallel.head_partition import plan_model


def qwen3_1b7(seed: int) -> ModelConfig:
    """Qwen3-1.7B's shape with 56 random FA heads: layers have none, some or many."""
    chosen = random.Random(seed).sample(range(28 * 16), 56)
    heads = tuple(tuple(sorted(c % 16 for c in chosen if c // 16 == layer)) for layer in range(28))
    return ModelConfig(
        family="qwen3", num_layers=28, hidden_size=2048, ffn_hidden_size=6144, vocab_size=151936,
        num_query_heads=16, num_kv_heads=8, head_dim=128, hydra=HydraConfig(),
        full_attention_heads=heads,
    )  # fmt: skip


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_sequence_partition_spreads_the_work_of_any_map(tp):
    model, length = qwen3_1b7(0), 524_288
    worst = 1.0
    for partition in plan_model(model, tp, "sequence"):
        loads = rank_loads(model, partition, length)
        expected = len(model.fa_heads(partition.layer)) * full_attention_flops(length, 128)
        assert sum(load.full_attention for load in loads) == pytest.approx(expected)
        worst = max(worst, imbalance(loads))
    assert worst < 1.1  # the rest: the number of GDN heads is not a multiple of the ranks


def test_heads_partition_leaves_ranks_idle_at_long_context():
    model = qwen3_1b7(0)
    by_heads = [rank_loads(model, p, 524_288) for p in plan_model(model, 8, "heads")]
    assert max(imbalance(loads) for loads in by_heads) > 4


@pytest.mark.parametrize("window", [1, 5, 12, 13, 40])
def test_a_window_bounds_the_pairs(window):
    pairs = sum(min(t + 1, window) for t in range(12))
    assert full_attention_flops(12, 8, window) == 4 * 8 * pairs


def test_both_kinds_in_every_head_are_both_counted():
    model = dataclasses.replace(
        qwen3_1b7(0),
        hydra=HydraConfig(mixer="token", window=512),
        full_attention_heads=(tuple(range(16)),) * 28,
    )
    for partition in plan_model(model, 4, "heads"):
        loads = rank_loads(model, partition, 8192)
        assert imbalance(loads) == 1.0
        fa = sum(load.full_attention for load in loads)
        assert fa == 16 * full_attention_flops(8192, 128, 512)
        gdn = sum(load.gated_delta_net for load in loads)
        assert gdn == 16 * gated_delta_net_flops(8192, 128)
