"""The stream: every layout reads the same global batches, resuming is exact, errors name the key."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hydra.config.run import BatchConfig, DataConfig, SourceConfig
from megatron_hydra.data import PackedStream, pack_index, sampling
from megatron_hydra.data.document import Document
from megatron_hydra.data.stream import pack_sequence
from megatron_hydra.data.tokenizer import tokenizer_fingerprint
from megatron_hydra.errors import HydraError
from megatron_hydra.hf_loading import load_tokenizer
from megatron_hydra.parallel.packed_sequence import PackedSequence
from tests.data.corpora import numbered_documents, write_indexed
from tests.data.test_indexed import manifest_for

LENGTHS = [5, 30, 7, 64, 1, 12, 100, 33, 8, 20, 41, 17]
NEEDLES = SourceConfig(kind="synthetic", task="needles", options={"num_needles": 2}, weight=1.0)


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """Two indexed parts; no two tokens are equal."""
    web, _ = write_indexed(tmp_path / "web", numbered_documents(LENGTHS))
    books, _ = write_indexed(tmp_path / "books", numbered_documents([64] * 9))
    blend = (SourceConfig(path=web, weight=2.0), SourceConfig(path=books, weight=1.0))
    return DataConfig(blend=blend, sequence_length=64, packing="split_long")


def stream(data: DataConfig, batch=(1, 4), rank=0, size=1, vocab_size=1000) -> PackedStream:
    config = BatchConfig(*batch)
    return PackedStream(data, config, dp_rank=rank, dp_size=size, vocab_size=vocab_size)


def sequences(data: DataConfig, step: int, micro: int, size: int) -> dict[int, list[list[int]]]:
    """Sample number → tokens and labels, gathered from all ranks; checks each rank's share, too."""
    found: dict[int, list[list[int]]] = {}
    length = data.sequence_length
    for rank in range(size):
        batches = stream(data, (micro, 12), rank, size).micro_batches(step)
        assert len(batches) == 12 // (micro * size)
        for batch in batches:
            assert len(batch.sample_ids) == micro
            for row, sample in enumerate(batch.sample_ids):
                span = slice(row * length, (row + 1) * length)
                edges = [c for c in batch.cu_seqlens if span.start <= c <= span.stop]
                assert edges[0] == span.start
                assert edges[-1] == span.stop
                assert sample not in found
                found[sample] = [
                    batch.tokens[span].tolist(),
                    batch.labels[span].tolist(),
                    batch.loss_mask[span].tolist(),
                    [edge - span.start for edge in edges],
                ]
    return found


def test_a_global_batch_is_the_same_for_every_layout(data):
    for step in (0, 3):
        reference = sequences(data, step, 1, 1)
        assert sorted(reference) == list(range(step * 12, step * 12 + 12))
        for micro, size in ((2, 1), (1, 3), (2, 3), (3, 4), (1, 12)):
            assert sequences(data, step, micro, size) == reference


def test_the_order_of_samples_in_a_step_does_not_depend_on_the_layout(data):
    orders = []
    for micro, size in ((1, 1), (2, 2), (1, 4)):
        ranks = [
            [b.sample_ids for b in stream(data, (micro, 8), r, size).micro_batches(5)]
            for r in range(size)
        ]
        orders.append([s for group in zip(*ranks, strict=True) for ids in group for s in ids])
    assert orders[0] == orders[1] == orders[2]


def test_every_token_is_read_once_per_epoch_and_each_epoch_has_its_own_order(data):
    only = dataclasses.replace(data, blend=data.blend[:1])
    opened = stream(only, (1, 1))
    packs = opened.sources[0].samples_per_epoch
    orders = []
    for epoch in range(3):
        tokens = []
        for step in range(epoch * packs, (epoch + 1) * packs):
            (batch,) = opened.micro_batches(step)
            tokens.append([t for t in batch.tokens.tolist() if t])
        assert sorted(t for pack in tokens for t in pack) == list(range(1, sum(LENGTHS) + 1))
        orders.append(tokens)
    assert orders[0] != orders[1] != orders[2]


def test_labels_and_mask_stay_inside_documents(data):
    for batch in stream(data, (2, 4)).micro_batches(0):
        for begin, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            tokens, mask = batch.tokens[begin:end], batch.loss_mask[begin:end]
            assert mask[-1] == 0
            if tokens[0] == 0:
                assert mask.sum() == 0
                continue
            assert (batch.labels[begin : end - 1] == tokens[1:]).all()
            assert mask[:-1].all()
            assert (tokens[1:] == tokens[:-1] + 1).all()


DOCUMENTS = st.lists(st.lists(st.booleans(), min_size=1, max_size=8), min_size=1, max_size=5)


@given(flags=DOCUMENTS, padding=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_a_loss_mask_never_crosses_documents(flags, padding):
    documents, used = [], 0
    for learned in flags:
        tokens = np.arange(1, len(learned) + 1) + 10 * len(documents)
        documents.append(Document(tokens, np.array(learned)))
        used += len(learned)
    tokens, labels, mask, ends = pack_sequence(documents, used + padding)
    assert ends == [
        *np.cumsum([len(f) for f in flags]).tolist(),
        *([used + padding] * (padding > 0)),
    ]
    for position in np.flatnonzero(mask).tolist():
        assert position + 1 not in ends
        assert labels[position] == tokens[position + 1]
    learned_tokens = sum(sum(learned[1:]) for learned in flags)
    assert mask.sum() == learned_tokens


def test_a_resumed_stream_continues_with_the_next_sample(data, qwen):
    data = dataclasses.replace(data, blend=(*data.blend, NEEDLES), sequence_length=256)
    data = dataclasses.replace(data, tokenizer=qwen)
    through = stream(data)
    expected = [through.micro_batches(step) for step in range(6)]
    before = stream(data)
    before.micro_batches(0)
    before.micro_batches(1)
    state = json.loads(json.dumps(before.state()))
    assert state["samples"] == 8
    resumed = [stream(data, (2, 4), rank, 2) for rank in range(2)]
    step = [part.check_state(state) for part in resumed]
    assert step == [2, 2]
    for number in range(2, 6):
        batches = [part.micro_batches(number)[0] for part in resumed]
        tokens = np.concatenate([batch.tokens.numpy() for batch in batches])
        wanted = np.concatenate([batch.tokens.numpy() for batch in expected[number]])
        assert np.array_equal(tokens, wanted)
        assert resumed[0].state()["step"] == number + 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 5}, r"data\.seed was 1234 and is 5"),
        ({"sequence_length": 100}, r"data\.sequence_length was 64 and is 100"),
        ({"packing": "concat_chunk"}, r"data\.packing was 'split_long'"),
    ],
)
def test_a_resume_with_another_order_is_refused_by_name(data, change, name):
    state = stream(data).state(3)
    with pytest.raises(HydraError, match=f"cannot resume: {name}"):
        stream(dataclasses.replace(data, **change)).check_state(state)


def test_a_resume_with_another_blend_is_refused_by_name(data, tmp_path):
    state = stream(data).state(3)
    first, second = data.blend
    heavier = dataclasses.replace(second, weight=5.0)
    with pytest.raises(HydraError, match=r"data\.blend\[1\].*books.*another weight"):
        stream(dataclasses.replace(data, blend=(first, heavier))).check_state(state)
    with pytest.raises(HydraError, match=r"data\.blend had 2 parts and has 1"):
        stream(dataclasses.replace(data, blend=(first,))).check_state(state)
    with pytest.raises(HydraError, match=r"global_batch_size was 4 and is 8"):
        stream(data, (1, 8)).check_state(state)
    write_indexed(tmp_path / "web", numbered_documents([*LENGTHS, 3]))
    with pytest.raises(HydraError, match=r"data\.blend\[0\].*web.*another fingerprint"):
        stream(data).check_state(state)
    with pytest.raises(HydraError, match="data state is damaged"):
        stream(data).check_state({"step": 3})


def test_a_resume_with_other_packs_or_another_order_is_refused_by_name(data, tmp_path, monkeypatch):
    """The options are equal, but the order differs, as after a change of NumPy's shuffle."""
    state = stream(data).state(3)
    with monkeypatch.context() as patch:
        patch.setattr(
            PackedStream, "_shuffled_samples", lambda self, step, size: np.arange(size)[::-1]
        )
        with pytest.raises(HydraError, match="cannot resume: order of samples was"):
            stream(data).check_state(state)
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "mix64", lambda value: (value * 5 + 1) % 2**64)
        with pytest.raises(HydraError, match=r"data\.blend\[0\].*web.*another fingerprint"):
            stream(data).check_state(state)
    elsewhere = dataclasses.replace(data, cache_dir=str(tmp_path / "elsewhere"))
    original = pack_index.pack_documents
    with monkeypatch.context() as patch:
        patch.setattr(
            pack_index,
            "pack_documents",
            lambda o, n, s, p, seed, name: original(o, n, s, p, 9, name),
        )
        with pytest.raises(HydraError, match=r"data\.blend\[0\].*web.*another fingerprint"):
            stream(elsewhere).check_state(state)
    again = dataclasses.replace(data, cache_dir=str(tmp_path / "again"))
    assert stream(again).check_state(state) == 3


def test_moved_files_are_the_same_data(data, tmp_path):
    state = stream(data).state(3)
    (tmp_path / "elsewhere").mkdir()
    for suffix in (".bin", ".idx"):
        (tmp_path / f"web{suffix}").rename(tmp_path / "elsewhere" / f"web{suffix}")
    moved = dataclasses.replace(data.blend[0], path=str(tmp_path / "elsewhere" / "web"))
    blend = (moved, data.blend[1])
    assert stream(dataclasses.replace(data, blend=blend)).check_state(state) == 3


def test_no_epoch_repeats_silently(data, caplog):
    opened = stream(data, (1, 4))
    packs = [source.samples_per_epoch for source in opened.sources]
    with caplog.at_level(logging.WARNING):
        for step in range(12):
            opened.micro_batches(step)
    drawn = [numbers["samples"] for numbers in opened.epoch_report(12).values()]
    restarts = sum(-(-int(d) // p) - 1 for d, p in zip(drawn, packs, strict=True))
    assert restarts >= 3
    assert len([r for r in caplog.records if "starts epoch" in r.message]) == restarts
    silent = stream(data, (1, 4), rank=1, size=2)
    caplog.clear()
    for step in range(12):
        silent.micro_batches(step)
    assert not caplog.records


def test_the_log_counts_steps_from_one_and_one_rank_writes_it(data, caplog, monkeypatch):
    only = dataclasses.replace(data, blend=data.blend[:1])
    opened = stream(only, (1, 1))
    last = opened.sources[0].samples_per_epoch
    assert not opened.epoch_restarts(last - 1)
    opened.micro_batches(last)
    assert caplog.messages[0].startswith(f"step {last + 1}: ")
    caplog.clear()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)  # in replica 0, but not rank 0
    opened.micro_batches(last)
    assert not caplog.messages


def test_shares_follow_the_weights(data):
    report = stream(data).epoch_report(300)
    tokens = [numbers["tokens"] for numbers in report.values()]
    assert tokens[0] / tokens[1] == pytest.approx(2.0, rel=0.01)
    assert sum(tokens) == 300 * stream(data).tokens_per_step


def test_budgets_are_checked_before_the_first_step(data):
    limited = dataclasses.replace(data, token_budget=10 * 4 * 64)
    assert stream(limited).plan(10)
    with pytest.raises(HydraError, match=r"data\.token_budget 2,560; at most 10 steps"):
        stream(limited).plan(11)
    blend = (dataclasses.replace(data.blend[0], max_epochs=1.5), data.blend[1])
    with pytest.raises(HydraError, match=r"data\.blend\[0\].*web would be read .* max_epochs 1\.5"):
        stream(dataclasses.replace(data, blend=blend)).plan(100)


def test_a_path_named_twice_is_read_by_both(data):
    part = dataclasses.replace(data.blend[0], weight=1.0, max_epochs=1.0)
    opened = stream(dataclasses.replace(data, blend=(part, part)), (1, 1))
    packs = opened.sources[0].samples_per_epoch
    assert opened.plan(packs)
    with pytest.raises(HydraError, match=r"web would be read 1\.\d+ times"):
        opened.plan(packs + 1)


def test_a_wrong_tokenizer_is_found_before_training(data, qwen):
    with pytest.raises(HydraError, match=r"books\.bin holds token id 576, the model's vocabulary"):
        stream(data, vocab_size=400)
    with pytest.raises(HydraError, match=r"web\.bin holds token id 338"):
        stream(data, vocab_size=338)
    prefix = data.blend[0].path
    described = {"name": "other", "fingerprint": "0" * 64, "vocab_size": 1, "eod_id": 0}
    manifest_for(prefix, tokenizer=described)
    with pytest.raises(HydraError, match=r"web\.json: prepared with the tokenizer 'other'"):
        stream(dataclasses.replace(data, tokenizer=qwen))
    own = {**described, "fingerprint": tokenizer_fingerprint(load_tokenizer(qwen))}
    manifest_for(prefix, tokenizer=own)
    assert stream(dataclasses.replace(data, tokenizer=qwen)).micro_batches(0)


def test_a_wrong_manifest_is_found_in_the_batch(data):
    manifest_for(data.blend[0].path, counts={"max_token_id": 3})
    opened = stream(dataclasses.replace(data, blend=data.blend[:1]), (1, 12), vocab_size=50)
    with pytest.raises(HydraError, match=r"web: token id \d+ is outside"):
        opened.micro_batches(0)


def test_an_overlong_document_is_found_before_training(data):
    with pytest.raises(HydraError, match=r"web\.bin: document 6 has 100 tokens.*split_long"):
        stream(dataclasses.replace(data, packing="best_fit"))


@pytest.mark.parametrize(
    ("batch", "rank", "size", "message"),
    [
        ((1, 4), 0, 3, "not a multiple"),
        ((3, 4), 0, 1, "not a multiple"),
        ((0, 4), 0, 1, "micro_batch_size is 0"),
        ((1, 4), 2, 2, "rank 2 is outside"),
    ],
)
def test_impossible_layouts_are_refused(data, batch, rank, size, message):
    with pytest.raises(HydraError, match=message):
        stream(data, batch, rank, size)


def test_data_of_two_tokenizers_is_not_blended(data):
    described = {"name": "t", "vocab_size": 1000, "eod_id": 0}
    for part, mark in zip(data.blend, "ab", strict=True):
        manifest_for(part.path, tokenizer={**described, "fingerprint": mark * 64})
    with pytest.raises(HydraError, match=r"books\.json and .*web\.json name different tokenizers"):
        stream(data)


@pytest.mark.parametrize("upsample", [{"32k": 2}, {0: "x"}, {0.5: 1}, {-1: 1}, {0: -1}])
def test_senseless_upsampling_is_refused_by_name(data, upsample):
    part = dataclasses.replace(data.blend[0], upsample=upsample)
    with pytest.raises(HydraError, match=r"web: upsample .* needs lengths"):
        stream(dataclasses.replace(data, blend=(part,)))


CORPUS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


@given(
    lengths=CORPUS,
    length=st.integers(2, 48),
    packing=st.sampled_from(["best_fit", "split_long", "concat_chunk"]),
    size=st.integers(1, 3),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_any_number_of_ranks_reads_an_epoch_of_any_corpus(
    tmp_path_factory, lengths, length, packing, size, seed
):
    """Every token occurs once; positions restart at each document; no label is in the next document."""
    length = max(length, *lengths) if packing == "best_fit" else length
    prefix, _ = write_indexed(tmp_path_factory.mktemp("any") / "x", numbered_documents(lengths))
    data = DataConfig((SourceConfig(path=prefix),), length, "", packing, seed)
    starts = {1, *(np.cumsum(lengths) + 1).tolist()}
    ranks = [stream(data, (1, size), rank, size) for rank in range(size)]
    packs = ranks[0].sources[0].samples_per_epoch
    seen: list[int] = []
    for step in range(-(-packs // size)):
        for (batch,) in (rank.micro_batches(step) for rank in ranks):
            if batch.sample_ids[0] >= packs:
                continue  # the next epoch
            positions = PackedSequence(batch.cu_seqlens).positions_local
            expected = [torch.arange(b - a) for a, b in itertools.pairwise(batch.cu_seqlens)]
            assert torch.equal(positions, torch.cat(expected))
            real = batch.tokens > 0
            seen += batch.tokens[real].tolist()
            learned = batch.loss_mask > 0
            assert not learned[~real].any()
            assert (batch.labels[learned] == batch.tokens[learned] + 1).all()
            assert not starts & set(batch.labels[learned].tolist())
            for token, position in zip(batch.tokens.tolist(), positions.tolist(), strict=True):
                assert token not in starts or position == 0
    assert sorted(seen) == list(range(1, sum(lengths) + 1))
