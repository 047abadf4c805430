from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_hydra.config.run import BatchConfig, DataConfig, SourceConfig
from megatron_hydra.data.stream import PackedStream
from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.finding import load_task
from megatron_hydra.evaluation.tasks import SampleRequest
from megatron_hydra.quickstart import tasks as module
from megatron_hydra.quickstart.tasks import PAIRS, TRAIN_LENGTH
from megatron_hydra.quickstart.vocabulary import Vocabulary, build_tokenizer
from megatron_hydra.selection.prompts import read_jsonl


def test_shipped_tokenizer_is_the_built_one(tokenizer):
    built = build_tokenizer()
    text = 'A Fact: <k03><v31>, "Said" (twice);\nend.'
    assert tokenizer.get_vocab() == built.get_vocab()
    ids = tokenizer(text)["input_ids"]
    assert ids == built(text)["input_ids"]
    assert tokenizer.decode(ids) == text.lower()
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.unk_token_id in tokenizer("50 €")["input_ids"]


@pytest.mark.parametrize("length", [TRAIN_LENGTH, 1000])
def test_needles_hide_every_fact_and_ask_for_some(tasks, length):
    rng = np.random.default_rng(0)
    keys, values = set(tasks.vocabulary.keys), set(tasks.vocabulary.values)
    for _ in range(50):
        sample = tasks.needles(rng, length, PAIRS, 16)
        body = sample.tokens[: length - 32]
        at = [i for i, token in enumerate(body) if token in keys]
        assert len(at) == PAIRS
        assert len({body[i] for i in at}) == PAIRS
        assert all(body[i + 1] in values for i in at)
        assert sum(token in values for token in body) == PAIRS
        # The answer follows its key, and repeats the value after this key in the text.
        assert (sample.tokens[sample.answers] == sample.tokens[sample.sources]).all()
        assert (sample.tokens[sample.answers - 1] == sample.tokens[sample.sources - 1]).all()
        assert len(set(sample.sources)) == 16 and sample.sources.max() < length - 32
        learned = sample.tokens[sample.loss_mask]
        assert sample.loss_mask[sample.answers].all() and not sample.loss_mask[0]
        assert sum(token in values for token in learned) == 16
        assert not any(token in keys for token in learned)


def test_facts_are_spread_over_the_whole_text(tasks):
    rng = np.random.default_rng(0)
    places = np.concatenate([tasks.needles(rng, 1024).sources for _ in range(100)])
    counts, _ = np.histogram(places, bins=8, range=(0, 1024 - 16))
    assert counts.min() > 60  # of 100 expected


def test_needles_refuse_what_does_not_fit(tasks):
    rng = np.random.default_rng(0)
    assert len(tasks.needles(rng, 96, 24, 24).tokens) == 96
    for length, pairs, queries in ((95, 24, 24), (128, 33, 8), (128, 8, 9), (128, 8, 0)):
        with pytest.raises(HydraError, match="do not fit"):
            tasks.needles(rng, length, pairs, queries)


def test_copying_repeats_a_segment(tasks):
    rng = np.random.default_rng(0)
    for _ in range(20):
        sample = tasks.copying(rng, 64)
        assert (sample.tokens[sample.answers] == sample.tokens[sample.sources]).all()
        assert sample.loss_mask.sum() == len(sample.answers) >= 32


def test_text_is_real_text(tasks, tokenizer):
    text = tokenizer.decode(tasks.plain_text(np.random.default_rng(1), 2000).tokens)
    assert " the " in text and "<k" not in text
    assert (tasks.text == tokenizer.unk_token_id).mean() < 0.01


def test_as_training_data(tokenizer):
    """The synthetic source finds the task by name; every sequence is one whole document."""
    name = "megatron_hydra.quickstart.tasks:"
    data = DataConfig(
        blend=(
            SourceConfig("synthetic", task=name + "needles", options={"queries": 16}),
            SourceConfig("synthetic", task=name + "needles", options={"loss": "all"}),
            SourceConfig("synthetic", task=name + "copying"),
            SourceConfig("synthetic", task=name + "plain_text"),
        ),
        sequence_length=128,
    )
    stream = PackedStream(
        data, BatchConfig(4, 4), dp_rank=0, dp_size=1, vocab_size=104, tokenizer=tokenizer
    )
    (batch,) = stream.micro_batches(0)
    assert batch.cu_seqlens == (0, 128, 256, 384, 512)
    by_source = {stream.draw(n).source: i for i, n in enumerate(batch.sample_ids)}
    masks = {s: batch.loss_mask.view(4, 128)[i] for s, i in by_source.items()}
    assert masks[0].sum() < 128 - 2 * PAIRS
    assert masks[1].sum() == 127


def test_unknown_loss_is_refused(tokenizer):
    with pytest.raises(HydraError, match="targets or all"):
        module.needles(np.random.default_rng(0), 128, tokenizer, loss="some")


def test_as_evaluation(tokenizer):
    task = load_task("megatron_hydra.quickstart.tasks:retrieval")
    request = SampleRequest(length=256, count=5, seed=3, tokenizer=tokenizer)
    samples = task.samples(request)
    assert len(samples) == 5
    assert all(len(s.tokens) == 256 and len(s.answers) == 8 for s in samples)
    assert all(0 <= d < 1 for s in samples for d in s.depths)
    assert samples == task.samples(request)
    assert samples != task.samples(SampleRequest(length=256, count=5, seed=4, tokenizer=tokenizer))


def test_selection_prompts_are_aligned(tokenizer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    module.write_selection_prompts(path, tokenizer, 20, seed=0)
    pairs = read_jsonl(path, None)
    assert len(pairs) == 20
    vocabulary = Vocabulary.of(tokenizer)
    for pair in pairs:
        for prompt, right in ((pair.clean, pair.answer), (pair.corrupted, pair.wrong)):
            place = prompt.index(prompt[-1])
            assert (prompt[place + 1],) == right
            assert place < len(prompt) - 1
        different = [a for a, b in zip(pair.clean, pair.corrupted) if a != b]
        assert len(different) == 2 and set(different) <= set(vocabulary.keys)


def test_calibration_is_token_ids(tokenizer, tmp_path):
    path = tmp_path / "calibration.jsonl"
    module.write_calibration(path, tokenizer, seed=0, count=3)
    rows = [json.loads(line)["tokens"] for line in path.read_text().splitlines()]
    assert [len(row) for row in rows] == [TRAIN_LENGTH] * 3


def test_another_tokenizer_is_refused():
    class Other:
        name_or_path = "other"

        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(HydraError, match="<k00>"):
        Vocabulary.of(Other())
