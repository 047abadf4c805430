"""Packing of random corpora: every token once, no sequence too long, little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hydra.data.packing import best_fit_decreasing, pack_documents, upsample
from megatron_hydra.errors import HydraError

LENGTHS = st.lists(st.integers(0, 90), min_size=1, max_size=60).filter(any)
PACKINGS = st.sampled_from(["best_fit", "split_long", "concat_chunk"])


def spans(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array(lengths, dtype=np.int64)
    return np.cumsum(sizes) - sizes, sizes


def log_normal(documents: int, seed: int = 0) -> np.ndarray:
    """Random lengths as of web text: a median of 600 tokens and a long tail."""
    rng = np.random.default_rng(seed)
    return rng.lognormal(np.log(600), 1.2, documents).astype(np.int64) + 1


@given(lengths=LENGTHS, size=st.integers(2, 100), packing=PACKINGS, seed=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_every_token_is_in_exactly_one_pack_and_no_piece_crosses_a_document(
    lengths, size, packing, seed
):
    if packing == "best_fit":
        size = max(size, *lengths)
    packs = pack_documents(*spans(lengths), size, packing, seed, "corpus")
    seen = np.zeros(sum(lengths), dtype=int)
    ends = np.cumsum(lengths)
    for pack in range(len(packs)):
        pieces = packs.pieces(pack)
        assert 0 < sum(length for _, length in pieces) <= size
        for offset, length in pieces:
            assert length > 0
            seen[offset : offset + length] += 1
            first, last = np.searchsorted(ends, [offset, offset + length - 1], side="right")
            assert first == last
    assert (seen == 1).all()


@given(lengths=LENGTHS, seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_best_fit_keeps_documents_whole(lengths, seed):
    packs = pack_documents(*spans(lengths), max(lengths) + 5, "best_fit", seed, "corpus")
    assert sorted(packs.lengths.tolist()) == sorted(n for n in lengths if n)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80))
@settings(max_examples=200, deadline=None)
def test_batched_best_fit_is_best_fit_one_by_one(lengths):
    ordered = np.array(sorted(lengths, reverse=True))
    bins: list[int] = []
    for length in ordered.tolist():
        fitting = [room for room in bins if room >= length]
        if fitting:
            bins.remove(min(fitting))
            bins.append(min(fitting) - length)
        else:
            bins.append(50 - length)
    bin_of, count = best_fit_decreasing(ordered, 50)
    rooms = 50 - np.bincount(bin_of, weights=ordered, minlength=count)
    assert sorted(rooms.tolist()) == sorted(bins)


@pytest.mark.parametrize(("size", "allowed"), [(4096, 0.03), (32768, 0.01)])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None)
def test_waste_on_a_log_normal_corpus(size, allowed, seed):
    lengths = log_normal(20_000, seed)
    whole = lengths[lengths <= size]
    assert pack_documents(*spans(whole), size, "best_fit", seed, "corpus").waste() <= allowed
    assert pack_documents(*spans(lengths), size, "split_long", seed, "corpus").waste() <= allowed


def test_concat_chunk_wastes_only_the_last_pack():
    packs = pack_documents(*spans([7] * 100), 64, "concat_chunk", 0, "corpus")
    assert len(packs) == 11
    assert packs.waste() == pytest.approx(4 / (11 * 64))


def test_the_order_depends_on_the_seed_only():
    lengths = np.minimum(log_normal(500), 4096)
    one, same, other = (
        pack_documents(*spans(lengths), 4096, "best_fit", seed, "corpus") for seed in (1, 1, 2)
    )
    assert np.array_equal(one.offsets, same.offsets)
    assert not np.array_equal(one.offsets, other.offsets)


def test_an_overlong_document_is_named():
    with pytest.raises(HydraError, match=r"books: document 2 has 101 tokens.*split_long"):
        pack_documents(*spans([50, 60, 101]), 100, "best_fit", 0, "books")


def test_a_corpus_without_tokens_is_named():
    with pytest.raises(HydraError, match="books is empty"):
        pack_documents(*spans([0, 0]), 100, "split_long", 0, "books")


def test_upsampling_repeats_and_drops_by_bucket():
    lengths = np.array([5] * 1000 + [50] * 1000 + [500] * 1000)
    times = np.bincount(upsample(lengths, {0: 0, 50: 1.5, 500: 3}, 0, "x"), minlength=3000)
    assert (times[:1000] == 0).all()
    assert set(times[1000:2000]) == {1, 2}
    assert times[1000:2000].mean() == pytest.approx(1.5, abs=0.06)
    assert (times[2000:] == 3).all()
    assert np.array_equal(upsample(lengths, {400: 2}, 0, "x")[:2000], np.arange(2000))


@pytest.mark.parametrize("factors", [{0: -1.0}, {-5: 2.0}, {0: float("inf")}, {0: 0.0}])
def test_senseless_upsampling_is_refused(factors):
    with pytest.raises(HydraError, match="books: upsample"):
        upsample(np.array([1, 2, 3]), factors, 0, "books")
