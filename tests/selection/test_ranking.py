"""Standardising scores, fusing them, and choosing heads under constraints."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_hydra.config.selection import Constraints
from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import ModelIdentity
from megatron_hydra.selection.ranking import (
    budget,
    choose_heads,
    fuse,
    rank_heads,
    spearman,
    spread_evenly,
    standardise,
    whole_layers,
)

MODEL = ModelIdentity("m", "", "qwen3", 4, 8, 4, 16, 64)


def scores(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((4, 8))


def test_standardise_does_not_amplify_noise() -> None:
    signal = standardise(scores())
    assert signal.mean() == pytest.approx(0, abs=1e-12)
    assert signal.std() == pytest.approx(1)
    assert np.abs(standardise(1e-6 * scores())).max() < 0.01


def test_fuse_weighs_standardised_scores() -> None:
    a, b = scores(0), 100 * scores(1)
    expected = (2 * standardise(a) + 1 * standardise(b)) / 3
    np.testing.assert_allclose(fuse({"a": a, "b": b}, {"a": 2.0}), expected)
    with pytest.raises(HydraError, match="--task-weight c"):
        fuse({"a": a}, {"c": 1.0})
    with pytest.raises(HydraError, match="must be positive"):
        fuse({"a": a}, {"a": 0.0})


def test_ranking_breaks_ties_by_position() -> None:
    assert rank_heads(np.array([[0.0, 1.0], [1.0, 2.0]])) == [(1, 1), (0, 1), (1, 0), (0, 0)]


def test_spearman() -> None:
    a = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert spearman(a, np.exp(a)) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1..4: worked out by hand.
    assert spearman(a, np.array([[1.0, 2.0], [2.0, 4.0]])) == pytest.approx(4.5 / np.sqrt(22.5))
    assert np.isnan(spearman(a, np.ones((2, 2))))


def test_without_constraints_the_top_of_the_ranking_is_chosen() -> None:
    s = scores()
    chosen = choose_heads(s, MODEL, "7:1", Constraints())
    found = {(layer, h) for layer, heads in enumerate(chosen) for h in heads}
    assert found == set(rank_heads(s)[:4])


@pytest.mark.parametrize(
    ("ratio", "count"), [("all-gdn", 0), ("dense", 32), ("31:1", 1), ("3:1", 8)]
)
def test_ratios(ratio: str, count: int) -> None:
    chosen = choose_heads(scores(), MODEL, ratio, Constraints())
    assert sum(map(len, chosen)) == count


def test_least_and_most_per_layer() -> None:
    s = scores()
    s[0] += 10
    counts = [len(x) for x in choose_heads(s, MODEL, "3:1", Constraints())]
    assert counts == [8, 0, 0, 0]
    chosen = choose_heads(s, MODEL, "3:1", Constraints(min_per_layer=1, max_per_layer=4))
    assert [len(x) for x in chosen] == [4, *(len(x) for x in chosen[1:])]
    assert sum(map(len, chosen)) == 8
    assert all(1 <= len(x) <= 4 for x in chosen)
    assert set(chosen[0]) == set(np.argsort(-s[0])[:4])


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"min_per_layer": 2}, "--min-per-layer 2 needs 8 FA heads in 4 layers, the ratio gives 4"),
        ({"min_per_layer": 9}, "does not fit into a layer of 8 heads"),
        ({"max_per_layer": 0}, "--max-per-layer must be at least 1"),
        ({"granularity": "layer"}, "--granularity layer"),
        ({"kv_group_bonus": -1.0}, "must not be negative"),
        ({"granularity": "kv_group", "kv_group_bonus": 1.0}, "--kv-group-bonus is for"),
    ],
)
def test_impossible_constraints_are_refused(constraints: dict, message: str) -> None:
    with pytest.raises(HydraError, match=message):
        choose_heads(scores(), MODEL, "7:1", Constraints(**constraints))


def test_most_per_layer_below_the_budget_is_refused() -> None:
    with pytest.raises(HydraError, match="--max-per-layer 1 allows 4 FA heads in 4 layers"):
        choose_heads(scores(), MODEL, "3:1", Constraints(max_per_layer=1))


def test_kv_groups_are_chosen_whole_by_their_mean() -> None:
    s = np.zeros((4, 8))
    s[2, 4:6] = 1.0
    s[1, 1] = 1.5
    constraints = Constraints(granularity="kv_group")
    assert choose_heads(s, MODEL, "15:1", constraints) == ((), (), (4, 5), ())
    assert choose_heads(s, MODEL, "7:1", constraints) == ((), (0, 1), (4, 5), ())
    assert budget(MODEL, "31:1", "kv_group") == 2


def test_the_bonus_prefers_heads_of_open_groups() -> None:
    s = np.zeros((4, 8))
    s[0, 0], s[3, 7], s[0, 1] = 3.0, 1.0, 0.9
    assert choose_heads(s, MODEL, "15:1", Constraints()) == ((0,), (), (), (7,))
    with_bonus = Constraints(kv_group_bonus=0.5)
    assert choose_heads(s, MODEL, "15:1", with_bonus) == ((0, 1), (), (), ())


def test_an_equal_share_for_every_layer() -> None:
    chosen = choose_heads(scores(), MODEL, "4:1", Constraints(), same_in_every_layer=True)
    assert sorted(len(x) for x in chosen) == [1, 1, 2, 2]
    s = scores()
    assert all(set(x) == set(np.argsort(-row)[: len(x)]) for x, row in zip(chosen, s, strict=True))


def test_spread_evenly() -> None:
    assert spread_evenly(5, 3) == [1, 2, 2]
    assert spread_evenly(2, 4) == [0, 1, 0, 1]


def test_whole_layers() -> None:
    every = tuple(range(8))
    assert whole_layers(MODEL, "3:1") == ((), (), (), every)
    assert whole_layers(MODEL, "1:1") == ((), every, (), every)
    assert whole_layers(MODEL, "31:1") == ((), (), (), every)
    best = np.array([0.1, 0.4, 0.2, 0.3])
    assert whole_layers(MODEL, "3:1", best) == ((), every, (), ())
    assert whole_layers(MODEL, "1:1", best) == ((), every, (), every)
    assert whole_layers(MODEL, "all-gdn") == ((), (), (), ())
    assert whole_layers(MODEL, "dense") == (every,) * 4
