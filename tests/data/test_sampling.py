"""Permutations and blends: every sample once, sources in their shares, memory constant."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hydra.data.sampling import Blend, Permutation, derive_key
from megatron_hydra.errors import HydraError

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_a_permutation_meets_every_element_once(size, key):
    permutation = Permutation(size, key)
    assert sorted(map(permutation, range(size))) == list(range(size))


def test_permutations_of_different_keys_differ_and_look_shuffled():
    first, second = ([Permutation(1000, key)(i) for i in range(1000)] for key in (1, 2))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.15


def test_a_huge_permutation_costs_nothing():
    permutation = Permutation(10**12, 3)
    assert len({permutation(i) for i in range(1000)}) == 1000
    with pytest.raises(IndexError):
        permutation(10**12)


@given(weights=WEIGHTS, cut=st.integers(0, 70_000))
@settings(max_examples=40, deadline=None)
def test_a_blend_draws_every_index_of_every_part_in_order_and_in_its_share(weights, cut):
    blend = Blend(weights, [str(i) for i in range(len(weights))])
    counts = [0] * len(weights)
    for sample in range(cut, cut + 500):
        draw = blend.draw(sample)
        before = blend.drawn_before(sample)
        assert draw.index == before[draw.source]
        counts[draw.source] += 1
    after = blend.drawn_before(cut + 500)
    assert [a - b for a, b in zip(after, blend.drawn_before(cut), strict=True)] == counts
    shares = np.array(weights) / sum(weights)
    assert np.abs(np.array(after) - shares * (cut + 500)).max() < 3 + 2e-5 * cut


def test_invalid_weights_are_refused_by_name():
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(HydraError, match="books has weight"):
            Blend([1.0, weight], ["web", "books"])
    with pytest.raises(HydraError, match="books is below"):
        Blend([1.0, 1e-9], ["web", "books"])
    with pytest.raises(HydraError, match="blend is empty"):
        Blend([], [])


def test_keys_tell_integers_from_strings():
    assert derive_key(1, "a") != derive_key("1", "a") != derive_key("1a")
