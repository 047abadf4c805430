"""Held-out documents: every seed, length and packing holds out the same ones; training never reads them."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from megatron_hydra.config.run import BatchConfig, DataConfig, SourceConfig, ValidationConfig
from megatron_hydra.data.held_out import Side, documents_of_side
from megatron_hydra.data.sampling import mix64, mix64_of
from megatron_hydra.data.stream import PackedStream
from megatron_hydra.data.validation import PADDING, ValidationStream
from megatron_hydra.errors import HydraError
from tests.data.corpora import numbered_documents, write_indexed

LENGTHS = [5, 30, 7, 64, 1, 12, 100, 33, 8, 20, 41, 17] * 6
LENGTH, VOCABULARY = 64, 10_000


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """An indexed part whose tokens are all different: each token identifies its document."""
    path, _ = write_indexed(tmp_path / "web", numbered_documents(LENGTHS))
    blend = (SourceConfig(path=path),)
    return DataConfig(blend=blend, sequence_length=LENGTH, packing="split_long", held_out=0.2)


def _validation(data: DataConfig, sequences=4, micro=1, rank=0, size=1, **more) -> ValidationStream:
    return ValidationStream(
        data, ValidationConfig(interval=1, sequences=sequences, **more), micro_batch_size=micro,
        dp_rank=rank, dp_size=size, vocab_size=VOCABULARY,
    )  # fmt: skip


def _documents_read(data: DataConfig, steps: int) -> set[int]:
    """Indices of the documents that training reads in ``steps`` steps."""
    stream = PackedStream(data, BatchConfig(1, 4), dp_rank=0, dp_size=1, vocab_size=VOCABULARY)
    tokens = np.concatenate(
        [d.tokens for sample in range(4 * steps) for d in stream.documents(sample)]
    )
    return _documents_of(tokens)


def _documents_of(tokens: np.ndarray) -> set[int]:
    last = np.cumsum(LENGTHS)  # the last token of every document
    return set(np.searchsorted(last, np.unique(tokens)).tolist())


def _held_out(share: float, count: int = len(LENGTHS)) -> set[int]:
    return set(np.flatnonzero(documents_of_side(count, Side(share, True))).tolist())


def test_many_numbers_are_mixed_as_one_is():
    numbers = [0, 1, 2, 17, 2**63, 2**64 - 1]
    assert mix64_of(np.array(numbers, dtype=np.uint64)).tolist() == [mix64(n) for n in numbers]


def test_sides_partition_the_documents_and_larger_shares_contain_smaller_ones():
    for share in (0.001, 0.05, 0.5):
        sides = [documents_of_side(200_000, Side(share, v)) for v in (True, False)]
        assert np.array_equal(sides[0], ~sides[1])
        deviation = (share * (1 - share) / 200_000) ** 0.5
        assert abs(sides[0].mean() - share) < 5 * deviation
    assert _held_out(0.05, 1000) < _held_out(0.2, 1000)
    assert _held_out(0.2, 500) == {
        n for n in _held_out(0.2, 1000) if n < 500
    }  # the corpus with more documents


@pytest.mark.parametrize("packing", ["split_long", "concat_chunk"])
@pytest.mark.parametrize("upsample", [{}, {0: 2.0, 20: 3.5}, {0: 0.5}])
def test_training_never_reads_what_validation_reads(data, packing, upsample):
    """This holds for every epoch and seed, and if documents are cut, repeated and dropped."""
    part = dataclasses.replace(data.blend[0], upsample=upsample)
    held_out = _held_out(data.held_out)
    for seed in (1, 2):
        changed = dataclasses.replace(data, packing=packing, blend=(part,), seed=seed)
        read = _documents_read(changed, steps=60)
        assert not read & held_out
        if not (upsample.get(0, 1.0) < 1):
            assert read == set(range(len(LENGTHS))) - held_out
        stream = _validation(changed)
        seen = np.concatenate([b.tokens[b.loss_mask != 0] for b in stream.micro_batches(0)])
        assert seen.size
        assert _documents_of(seen) <= held_out


def test_the_sequences_are_the_same_for_every_seed_batch_and_layout(data):
    """Sequence number → tokens and boundaries, gathered over all ranks."""
    found = []
    for seed, micro, size in ((1, 1, 1), (2, 2, 1), (1, 1, 3), (1, 3, 2), (7, 2, 4)):
        ranks = [
            _validation(dataclasses.replace(data, seed=seed), 5, micro, rank, size)
            for rank in range(size)
        ]
        sequences = {}
        for multiple in (1, 2):
            batches = [list(rank.micro_batches(0, multiple)) for rank in ranks]
            assert {len(b) for b in batches} == {ranks[0].num_micro_batches(0, multiple)}
            assert len(batches[0]) % multiple == 0
            for batch in itertools.chain(*batches):
                assert len(batch.sample_ids) == micro
                for row, number in enumerate(batch.sample_ids):
                    span = slice(row * LENGTH, (row + 1) * LENGTH)
                    if number == PADDING:
                        assert not batch.loss_mask[span].any()
                    else:
                        body = batch.tokens[span].tolist(), batch.loss_mask[span].tolist()
                        assert sequences.setdefault(number, body) == body
        assert sorted(sequences) == list(range(5))
        found.append(sequences)
        assert len({str(rank.fingerprint()) for rank in ranks}) == 1
    assert all(sequences == found[0] for sequences in found)


def test_sequences_are_split_by_weight_with_at_least_one_per_part(data, tmp_path):
    books, _ = write_indexed(tmp_path / "books", numbered_documents([60] * 9))
    blend = (
        dataclasses.replace(data.blend[0], weight=100.0),
        SourceConfig(path=books, weight=1.0),
        SourceConfig(
            kind="synthetic", task="tests.data.test_held_out:noise", weight=50.0,
            options={"document_length": [32, 32]},
        ),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_hydra.data.synthetic.importlib.metadata.packages_distributions",
                      lambda: {"tests": ["tests"]})  # fmt: skip
        stream = _validation(dataclasses.replace(data, held_out=0.0), 6, blend=blend)
        probes = ValidationStream(
            data, ValidationConfig(interval=1, probes=blend[2:] * 2, probe_sequences=3),
            micro_batch_size=1, dp_rank=0, dp_size=1, vocab_size=VOCABULARY, probes=True,
        )  # fmt: skip
    assert stream.labels == ["web", "books", "tests.data.test_held_out:noise@32"]
    assert stream.counts == [4, 1, 2]
    assert len(set(probes.labels)) == 2
    assert probes.counts == [3, 3]


def noise(rng, length, tokenizer):
    """A generated task of random tokens."""
    from megatron_hydra.data.document import Document

    return [Document.all_trainable(rng.integers(0, VOCABULARY, length))]


def test_generated_samples_are_others_than_those_of_training(data):
    blend = (SourceConfig(kind="synthetic", task="tests.data.test_held_out:noise"),)
    data = dataclasses.replace(data, blend=blend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_hydra.data.synthetic.importlib.metadata.packages_distributions",
                      lambda: {"tests": ["tests"]})  # fmt: skip
        training = PackedStream(
            data, BatchConfig(1, 4), dp_rank=0, dp_size=1, vocab_size=VOCABULARY
        )
        held_out = _validation(data)
    read = {tuple(training.documents(sample)[0].tokens.tolist()) for sample in range(64)}
    assert len(read) == 64
    seen = {tuple(batch.tokens.tolist()) for batch in held_out.micro_batches(0)}
    assert len(seen) == 4
    assert not read & seen


def test_without_a_share_nothing_changes(data):
    """If nothing is held out, the packing and its cache are those of earlier versions."""
    whole = dataclasses.replace(data, held_out=0.0)
    stream = PackedStream(whole, BatchConfig(1, 4), dp_rank=0, dp_size=1, vocab_size=VOCABULARY)
    assert "held_out" not in stream.sources[0].description["recipe"]
    assert stream.sources[0].description["report"]["documents_per_epoch"] == len(LENGTHS)
    state = stream.state(3)
    del state["fingerprint"]["data.held_out"]  # a checkpoint of an earlier version
    assert stream.check_state(state) == 3
    now = PackedStream(data, BatchConfig(1, 4), dp_rank=0, dp_size=1, vocab_size=VOCABULARY)
    with pytest.raises(HydraError, match=r"data\.held_out was None and is 0\.2 now"):
        now.check_state(state)


def test_a_side_without_documents_after_upsampling_is_refused(data):
    """The error names the key that holds out documents; it does not call the file empty."""
    part = dataclasses.replace(
        data.blend[0], upsample={0: 0, 100: 1}
    )  # six documents of 100 tokens
    few = dataclasses.replace(data, blend=(part,), held_out=0.001)
    with pytest.raises(HydraError, match=r"data\.held_out=0\.001 none .* is held out; raise"):
        _validation(few)
    most = dataclasses.replace(few, held_out=0.999)
    with pytest.raises(HydraError, match=r"data\.held_out=0\.999 none .* is trained on; lower"):
        _documents_read(most, 1)


def test_too_few_sequences_and_sequences_without_a_loss_are_refused(data, tmp_path):
    with pytest.raises(
        HydraError, match=r"validation\.sequences is 500: data\.blend\.0 .* has \d+;"
    ):
        _validation(data, 500)
    short, _ = write_indexed(tmp_path / "short", numbered_documents([1] * 9))
    with pytest.raises(
        HydraError, match=r"validation\.blend\.0 .*short\): its 1 held-out sequences have no"
    ):
        _validation(dataclasses.replace(data, held_out=0.0), 1, blend=(SourceConfig(path=short),))
