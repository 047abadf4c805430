"""A run may change its blend and batch: it counts what it has read and continues with the rest."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hydra.config.run import BatchConfig, DataConfig, SourceConfig
from megatron_hydra.data import PackedStream
from megatron_hydra.data.held_out import Side, documents_of_side
from megatron_hydra.data.sampling import Permutation
from megatron_hydra.errors import HydraError
from tests.data.corpora import numbered_documents, write_indexed

S = 16
NEEDLES = SourceConfig(kind="synthetic", task="needles", weight=1.0)


def _documents(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 30, count).tolist()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Prefixes of four corpora; no two tokens are equal."""
    folder = tmp_path_factory.mktemp("corpora")
    sizes = zip("abcd", (7, 19, 3, 11), strict=True)
    return [
        write_indexed(folder / name, numbered_documents(_documents(i, n)))[0]
        for i, (name, n) in enumerate(sizes)
    ]


def _stream(data: DataConfig, batch=(1, 4), rank: int = 0, size: int = 1) -> PackedStream:
    return PackedStream(data, BatchConfig(*batch), dp_rank=rank, dp_size=size, vocab_size=10_000)


def _data(corpora: list[str], weights: dict[int, float], phase: int = 1, **more) -> DataConfig:
    blend = tuple(SourceConfig(path=corpora[i], weight=w) for i, w in weights.items())
    return DataConfig(blend, S, packing="split_long", phase=phase, **more)


def _resumed(state: dict, data: DataConfig, batch=(1, 4), rank=0, size=1) -> PackedStream:
    opened = _stream(data, batch, rank, size)
    opened.check_state(json.loads(json.dumps(state)))
    return opened


def _read(ranks: list[PackedStream], step: int) -> dict[int, tuple[int, ...]]:
    """Sample number → tokens of the sequence without padding, from all ranks."""
    found = {}
    for rank in ranks:
        for batch in rank.micro_batches(step):
            rows = batch.tokens.reshape(len(batch.sample_ids), -1)
            for sample, row in zip(batch.sample_ids, rows, strict=True):
                assert sample not in found
                found[sample] = tuple(t for t in row.tolist() if t)
    return found


PHASES = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, 3), st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=4),
        st.sampled_from([(1, 2), (2, 4), (1, 6), (3, 12)]),  # micro, global batch
        st.sampled_from([1, 2]),  # replicas
        st.integers(0, 9),  # steps
    ),
    min_size=1,
    max_size=5,
)  # fmt: skip


@given(phases=PHASES)
@settings(max_examples=30, deadline=None)
def test_any_series_of_changes_reads_every_sequence_once_per_epoch(corpora, phases) -> None:
    """Brute force: the sequences of a source over all phases are whole epochs and a part of the next."""
    read: dict[str, list[tuple[int, ...]]] = collections.defaultdict(list)
    state, step, samples = None, 0, 0
    packs: dict[str, list[tuple[int, ...]]] = {}
    counts: dict[int, collections.Counter[str]] = {}
    for phase, (weights, batch, size, steps) in enumerate(phases, 1):
        data = _data(corpora, weights, phase)
        ranks = [_stream(data, batch, rank, size) for rank in range(size)]
        if state is not None:
            assert {rank.check_state(state) for rank in ranks} == {step}
        one = ranks[0]
        for source in one.sources:
            packs[source.name] = sorted(
                tuple(t for document in source.sample(n) for t in document.tokens.tolist())
                for n in range(source.samples_per_epoch)
            )
        for _ in range(steps):
            found = _read(ranks, step)
            assert sorted(found) == list(range(samples, samples + batch[1]))  # none left out
            for sample in sorted(found):
                name = one.sources[one.draw(sample).source].name
                read[name].append(found[sample])
                counts.setdefault(phase, collections.Counter())[name] += 1
            step, samples = step + 1, samples + batch[1]
        state = json.loads(json.dumps(one.state(step)))
        assert [json.loads(json.dumps(rank.state(step))) for rank in ranks] == [state] * size
    for name, sequences in read.items():
        period = len(packs[name])
        for start in range(0, len(sequences), period):
            epoch = sequences[start : start + period]
            assert not collections.Counter(epoch) - collections.Counter(packs[name])
        assert sorted(sequences[:period]) == packs[name] or len(sequences) < period
    # The checkpoint records what was read, in total and in every phase.
    for source in state["sources"]:
        sequences = read[source["name"]]
        assert source["samples"] == len(sequences)
        assert source["tokens"] == sum(map(len, sequences))
    for phase, expected in counts.items():
        told: collections.Counter[str] = collections.Counter()
        for span in state["spans"]:
            if span["phase"] == phase:
                for part in span["parts"]:
                    told[state["sources"][part["source"]]["name"]] += part["samples"]
        assert told == expected
    for name, sequences in read.items():
        rows = [
            (part["first"], part["samples"], part["tokens"])
            for span in state["spans"]
            for part in span["parts"]
            if state["sources"][part["source"]]["name"] == name
        ]
        at = 0
        for first, number, tokens in rows:  # each span begins where the last one ended
            assert first == at
            assert tokens == sum(map(len, sequences[first : first + number]))
            at += number
        assert at == len(sequences)
    assert sum(span["samples"] for span in state["spans"]) == state["samples"] == samples


def test_pieces_and_tokens_are_counted_as_if_one_by_one(corpora) -> None:
    source = _stream(_data(corpora, {1: 1.0})).sources[0]
    packs = source.samples_per_epoch
    each = [source.sample(n) for n in range(4 * packs)]
    for first, end in [(0, 0), (0, 1), (3, packs + 2), (packs, 2 * packs), (1, 4 * packs)]:
        pieces = sum(len(documents) for documents in each[first:end])
        tokens = sum(len(document) for documents in each[first:end] for document in documents)
        assert source.content(first, end) == (pieces, tokens)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_many_places_of_a_permutation_at_once(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    assert permutation.of(np.arange(size)).tolist() == [permutation(i) for i in range(size)]
    with pytest.raises(IndexError):
        permutation.of(np.array([size]))


def test_a_batch_there_and_back_reads_the_same_sequences_in_the_same_order(corpora) -> None:
    """Only the number of samples in a step changes; the samples are those of the unchanged run."""
    weights = {0: 1.0, 1: 2.0}
    steady = _stream(_data(corpora, weights))
    expected = {k: v for step in range(12) for k, v in _read([steady], step).items()}
    found, state, step = {}, None, 0
    for phase, (batch, steps) in enumerate([((1, 4), 3), ((2, 12), 2), ((1, 4), 3)], 1):
        opened = _stream(_data(corpora, weights, phase), batch)
        if state is not None:
            assert opened.check_state(state) == step
            assert not opened.has_new_blend
        for _ in range(steps):
            found |= _read([opened], step)
            step += 1
        state = json.loads(json.dumps(opened.state(step)))
    assert found == expected
    # and from this step on, each step is equal
    assert step == 8
    assert [span["global_batch_size"] for span in state["spans"]] == [4, 12, 4]
    assert state["samples"] == 48


def test_another_number_of_replicas_needs_no_phase_and_changes_no_step(corpora) -> None:
    data = _data(corpora, {0: 1.0, 1: 2.0})
    steady = _stream(data)
    for step in range(3):
        steady.micro_batches(step)
    state = steady.state()
    ranks = [_resumed(state, data, (2, 4), rank, 2) for rank in range(2)]
    for step in range(3, 9):
        own = [batch.sample_ids for batch in steady.micro_batches(step)]
        others = [rank.micro_batches(step)[0].sample_ids for rank in ranks]
        assert sum(own, ()) == sum(others, ())
        assert _read(ranks, step) == _read([steady], step)
    now = ranks[0].state(9)
    assert [span["data_parallel_size"] for span in now["spans"]] == [1, 2]
    assert [span["micro_batch_size"] for span in now["spans"]] == [1, 2]
    # If nothing changed, a resumed run continues in the same span.
    again = _resumed(now, data, (2, 4), 0, 2)
    assert again.state(10)["spans"][-1]["steps"] == 7
    assert len(again.state(10)["spans"]) == 2


def test_a_source_added_again_continues_at_its_position(corpora) -> None:
    state = _stream(_data(corpora, {0: 1.0, 1: 1.0})).state(5)
    without = _resumed(state, _data(corpora, {1: 1.0, 2: 1.0}, 2)).state(9)
    read = {s["name"]: s["samples"] for s in without["sources"]}
    assert read == {corpora[0]: 10, corpora[1]: 18, corpora[2]: 8}
    back = _resumed(without, _data(corpora, {2: 1.0, 0: 1.0}, 3))
    first = [back.draw(36), back.draw(37)]
    assert sorted((back.sources[d.source].name, d.index) for d in first) == [
        (corpora[0], 10),
        (corpora[2], 8),
    ]
    original = _stream(_data(corpora, {0: 1.0, 1: 1.0})).sources[0]
    assert back.sources[1].pack_number(10) == original.pack_number(10)  # it has its own order


def test_the_log_and_the_event_name_every_change(corpora) -> None:
    state = _stream(_data(corpora, {0: 1.0, 1: 1.0})).state(5)
    opened = _resumed(state, _data(corpora, {1: 3.0, 2: 1.0}, 2), (2, 8))
    change = opened.reading.change()
    assert change["phase"] == [1, 2]
    assert change["global_batch_size"] == [4, 8]
    assert change["micro_batch_size"] == [1, 2]
    weights = {source["name"]: source["weight"] for source in change["sources"]}
    assert weights == {corpora[0]: [1.0, None], corpora[1]: [1.0, 3.0], corpora[2]: [None, 1.0]}
    text = "\n".join(opened.reading.about_change(10))
    assert f"{corpora[0]}: no longer in the blend; 10 sequences read" in text
    assert f"{corpora[1]}: weight 1.0 -> 3.0; it continues after 10 sequences read" in text
    assert f"{corpora[2]}: in the blend with weight 1.0, 0 sequences read before" in text
    # 5 steps read 20 sequences; 5 more would read 20, but read 40 with a batch of 8.
    assert "schedule.steps=10 now reads 60, before 40; schedule.steps=8 reads as many" in text
    assert _resumed(state, _data(corpora, {0: 1.0, 1: 1.0})).reading.change() == {}


def test_budget_and_epochs_count_all_phases(corpora) -> None:
    state = _stream(_data(corpora, {0: 1.0, 1: 1.0})).state(5)  # 20 sequences
    data = _data(corpora, {0: 1.0, 1: 1.0}, 2, token_budget=(20 + 3 * 8) * S)
    assert _resumed(state, data, (1, 8)).plan(8)
    with pytest.raises(HydraError, match=r"after 320 in 5 steps .* at most 8 steps fit"):
        _resumed(state, data, (1, 8)).plan(9)
    whole = _stream(_data(corpora, {0: 1.0, 1: 1.0})).sources[0].samples_per_epoch
    part = SourceConfig(path=corpora[0], weight=1.0, max_epochs=(10 + 4) / whole)
    limited = dataclasses.replace(data, blend=(part,), token_budget=0)
    assert _resumed(state, limited, (1, 2)).plan(7)
    with pytest.raises(HydraError, match=r"blend\[0\].*above its max_epochs"):
        _resumed(state, limited, (1, 2)).plan(8)


def test_held_out_documents_stay_held_out_through_all_changes(corpora) -> None:
    share, state, step = 0.3, None, 0
    seen: dict[str, set[int]] = collections.defaultdict(set)
    for phase, weights in enumerate([{1: 1.0, 3: 1.0}, {3: 1.0}, {1: 4.0, 3: 1.0}], 1):
        data = _data(corpora, weights, phase, held_out=share)
        opened = _stream(data) if state is None else _resumed(state, data)
        for _ in range(12):
            for sample, tokens in _read([opened], step).items():
                seen[opened.sources[opened.draw(sample).source].name].update(tokens)
            step += 1
        state = opened.state(step)
    for number, count in ((1, 19), (3, 11)):
        lengths = _documents(number, count)
        ends = np.cumsum(lengths)
        ours = documents_of_side(count, Side(share, False))
        assert not ours.all()
        expected = {
            t for end, n, own in zip(ends, lengths, ours, strict=True) if own
            for t in range(end - n + 1, end + 1)
        }  # fmt: skip
        assert seen[corpora[number]] == expected


# -- what is refused ----------------------------------------------------------------------------


def test_a_change_without_a_phase_is_refused_and_the_key_that_allows_it_named(corpora) -> None:
    state = _stream(_data(corpora, {0: 1.0, 1: 1.0})).state(5)
    for data, batch in (
        (_data(corpora, {0: 1.0, 1: 2.0}), (1, 4)),
        (_data(corpora, {1: 1.0}), (1, 4)),
        (_data(corpora, {0: 1.0, 1: 1.0}), (1, 8)),
    ):
        with pytest.raises(
            HydraError, match=r"cannot resume: .* to allow the change, set data\.phase=2.*step 6"
        ):
            _resumed(state, data, batch)
    second = _resumed(state, _data(corpora, {1: 1.0}, 2)).state(7)
    with pytest.raises(
        HydraError, match=r"data\.phase was 2 and is 1 now: .* must not decrease; set it to 2"
    ):
        _resumed(second, _data(corpora, {1: 1.0}))
    with pytest.raises(HydraError, match=r"to allow the change, set data\.phase=3"):
        _resumed(second, _data(corpora, {2: 1.0}, 2))
    with pytest.raises(HydraError, match=r"data\.phase is 0"):
        _stream(_data(corpora, {1: 1.0}, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, r"data\.seed was"),
        ({"held_out": 0.5}, r"data\.held_out was"),
        ({"sequence_length": 24}, r"data\.sequence_length was"),
        ({"packing": "concat_chunk"}, r"data\.packing was"),
    ],
)
def test_a_phase_refuses_changes_of_the_set_of_samples(corpora, change, message):
    data = _data(corpora, {0: 1.0, 1: 1.0})
    state = _stream(data).state(5)
    with pytest.raises(HydraError, match=f"cannot resume: {message}"):
        _resumed(state, dataclasses.replace(data, phase=2, **change))


def test_documents_read_with_other_rules_are_refused(corpora, tmp_path: Path) -> None:
    prefix, _ = write_indexed(tmp_path / "web", numbered_documents(_documents(5, 12)))
    part = SourceConfig(path=prefix)
    data = DataConfig((part,), S, packing="split_long")
    state = _stream(data).state(2)
    data = dataclasses.replace(data, phase=2)
    longer = dataclasses.replace(part, upsample={0: 2})
    with pytest.raises(HydraError, match=r"web has been read with another upsample .*8 samples"):
        _resumed(state, dataclasses.replace(data, blend=(longer,)))
    (tmp_path / "moved").mkdir()
    for suffix in (".bin", ".idx"):
        (tmp_path / f"web{suffix}").rename(tmp_path / f"moved/web{suffix}")
    moved = dataclasses.replace(part, path=str(tmp_path / "moved/web"))
    assert (
        _resumed(state, dataclasses.replace(data, blend=(moved,))).reading.span.parts[0].first == 8
    )
    write_indexed(tmp_path / "web", numbered_documents(_documents(6, 12)))
    with pytest.raises(HydraError, match=r"web has been read with other tokens"):
        _resumed(state, data)


def test_damaged_records_are_refused(corpora) -> None:
    data = _data(corpora, {0: 1.0})
    for damage in (
        lambda s: s["spans"].clear(),
        lambda s: s["spans"][0].pop("phase"),
        lambda s: s["spans"][0].update(more=1),
        lambda s: s["sources"].clear(),
        lambda s: s["sources"][0].update(samples=3),
        lambda s: s.update(spans=5),
    ):
        state = json.loads(json.dumps(_stream(data).state(2)))
        damage(state)
        with pytest.raises(HydraError, match="data state is damaged"):
            _stream(data).check_state(state)


# -- checkpoints of earlier versions ------------------------------------------------------------------


def test_a_state_without_spans_resumes_and_may_change(corpora) -> None:
    data = _data(corpora, {0: 1.0, 1: 2.0})
    through = _stream(data)
    new = json.loads(json.dumps(through.state(5)))
    old = {key: new[key] for key in ("fingerprint", "step", "samples")}
    same = _resumed(old, data)
    assert _read([same], 5) == _read([through], 5)
    now = same.state(6)
    assert [s["samples"] for s in now["sources"]] == [8, 16]
    assert [s["tokens"] for s in now["sources"]] == [None, None]  # earlier steps were not counted
    later = _resumed(old, _data(corpora, {1: 1.0, 2: 1.0}, 2))
    draws = [later.draw(20), later.draw(21)]
    assert sorted((later.sources[d.source].name, d.index) for d in draws) == [
        (corpora[1], new["sources"][1]["samples"]),
        (corpora[2], 0),
    ]


def test_generated_parts_keep_their_samples_and_never_repeat(corpora, qwen) -> None:
    data = DataConfig((SourceConfig(path=corpora[1]), NEEDLES), 256, qwen, "split_long")
    state = _stream(data).state(3)
    expected = _stream(data).sources[1].sample(6)[0].tokens
    turned = dataclasses.replace(data, blend=(NEEDLES, data.blend[0]), phase=2)
    opened = _resumed(state, turned)
    draw = next(d for d in (opened.draw(12), opened.draw(13)) if d.source == 0)
    assert draw.index == 6
    assert np.array_equal(opened.drawn_documents(draw)[0].tokens, expected)
    assert opened.state(5)["sources"][1]["tokens"] is None
