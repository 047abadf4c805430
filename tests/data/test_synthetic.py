"""Generated tasks are deterministic, have the requested length, and contain their answers."""

from __future__ import annotations

import re

import numpy as np
import pytest

from megatron_hydra.config.run import BatchConfig, DataConfig, SourceConfig
from megatron_hydra.data import Document, PackedStream, synthetic_task
from megatron_hydra.data.synthetic import find_task, generate
from megatron_hydra.errors import HydraError
from megatron_hydra.hf_loading import load_tokenizer

TASKS = {
    "needles": {"num_needles": 4, "num_queries": 2},
    "multi_key": {"num_keys": 6},
    "variable_tracking": {"num_chains": 3, "num_hops": 2},
    "word_extraction": {"num_words": 2},
}
CASES = [(task, kind) for task in TASKS for kind in ("gpt2", "qwen", "llama")]


def make(task: str, tokenizer, index: int = 0, length: int = 1024, **options) -> Document:
    options = {**TASKS[task], **options}
    (document,) = generate(find_task(task), 7, index, length, tokenizer, options)
    return document


def split(document: Document, tokenizer) -> tuple[str, str]:
    """The context and the answer, without the end token."""
    answer = document.tokens[document.trainable]
    assert answer[-1] == tokenizer.eos_token_id
    context = document.tokens[~document.trainable]
    return tokenizer.decode(context), tokenizer.decode(answer[:-1]).strip()


@pytest.mark.parametrize(("task", "kind"), CASES)
@pytest.mark.parametrize("length", [400, 1024, 5000])
def test_samples_fill_their_length_and_learn_only_the_answer(tokenizers, task, kind, length):
    tokenizer = load_tokenizer(tokenizers[kind])
    for index in range(3):
        document = make(task, tokenizer, index, length)
        assert length - 12 <= len(document) <= length
        assert 2 <= document.trainable.sum() < 120
        assert document.trainable[-1]
        assert (np.diff(document.trainable.astype(int)) != 0).sum() == 1
        assert 0 <= document.tokens.min() <= document.tokens.max() < len(tokenizer)


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_a_pure_function_of_seed_and_number(qwen, task):
    tokenizer = load_tokenizer(qwen)
    one, same, other = (make(task, tokenizer, index) for index in (5, 5, 6))
    assert np.array_equal(one.tokens, same.tokens)
    assert not np.array_equal(one.tokens[: len(other)], other.tokens[: len(one)])
    (foreign,) = generate(find_task(task), 8, 5, 1024, tokenizer, TASKS[task])
    assert not np.array_equal(one.tokens[: len(foreign)], foreign.tokens[: len(one)])


@pytest.mark.parametrize("task", ["needles", "multi_key"])
@pytest.mark.parametrize("value", ["number", "word"])
def test_needles_can_be_found(qwen, task, value):
    tokenizer = load_tokenizer(qwen)
    for index in range(5):
        context, answer = split(make(task, tokenizer, index, value=value), tokenizer)
        facts = dict(re.findall(rf"The special {value} of ([\w-]+) is ([\w-]+)\.", context))
        asked = re.search(rf"what is the special {value} of ([\w, -]+)\?", context)[1].split(", ")
        assert len(facts) == {"needles": 4, "multi_key": 6}[task]
        assert answer == ", ".join(facts[key] for key in asked)


def test_a_text_can_consist_of_needles(qwen):
    tokenizer = load_tokenizer(qwen)
    context, _ = split(make("multi_key", tokenizer, length=4000, num_keys=None), tokenizer)
    assert len(re.findall("The special number", context)) > 50


def test_variables_can_be_tracked(qwen):
    tokenizer = load_tokenizer(qwen)
    for index in range(5):
        context, answer = split(make("variable_tracking", tokenizer, index), tokenizer)
        values: dict[str, str] = {}
        for name, source in re.findall(r"Set ([A-Z]{3}) = (\w+)\.", context):
            values[name] = values.get(source, source)
        asked = re.search(r"which variables hold (\d+)\?", context)[1]
        assert len(values) == 9
        assert answer.split(", ") == [name for name, value in values.items() if value == asked]


def test_frequent_words_can_be_counted(qwen):
    tokenizer = load_tokenizer(qwen)
    for length in (1024, 20_000):
        context, answer = split(make("word_extraction", tokenizer, length=length), tokenizer)
        body = context.split("than the others.")[1].split("\nQuestion")[0]
        words, counts = np.unique(body.split(), return_counts=True)
        order = np.argsort(-counts)
        assert set(answer.split(", ")) == set(words[order[:2]])
        assert counts[order[1]] >= 4 * counts[order[2]]


def test_loss_on_everything(qwen):
    assert make("needles", load_tokenizer(qwen), loss="all").trainable.all()


def test_several_short_documents_fill_a_sample(qwen):
    tokenizer = load_tokenizer(qwen)
    options = {"document_length": [200, 300]}
    documents = generate(find_task("needles"), 1, 0, 2000, tokenizer, options)
    assert len(documents) >= 6
    assert 1800 < sum(map(len, documents)) <= 2000
    assert all(200 <= len(document) <= 300 for document in documents)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("nedles", {}, r"unknown synthetic task 'nedles'; known: .*needles"),
        ("needles", {"needles": 3}, "needles.*needles"),
        ("needles", {"num_needles": 1, "num_queries": 2}, "num_queries 2 must be 1"),
        ("needles", {"value": "colour"}, "value is 'colour'"),
        ("needles", {"loss": "some"}, "loss is 'some'"),
        ("needles", {"num_needles": 900}, r"need \d+ tokens, but only 256"),
        ("needles", {"document_length": [300, 100]}, "document_length"),
        ("word_extraction", {"ratio": 99}, "do not fit into 256"),
        ("variable_tracking", {"num_chains": 0}, "num_chains >= 1"),
        ("no_such_package.tasks:make", {}, "no_such_package is not an installed package"),
        ("megatron_hydra.data:nothing", {}, "cannot be imported"),
    ],
)
def test_mistakes_fail_before_training_with_advice(qwen, task, options, message):
    part = SourceConfig(kind="synthetic", task=task, options=options)
    data = DataConfig(blend=(part,), sequence_length=256, tokenizer=qwen)
    with pytest.raises(HydraError, match=message):
        PackedStream(data, BatchConfig(1, 1), dp_rank=0, dp_size=1, vocab_size=500)


def test_text_tasks_ask_for_a_tokenizer():
    part = SourceConfig(kind="synthetic", task="needles")
    data = DataConfig(blend=(part,), sequence_length=256)
    with pytest.raises(HydraError, match=r"data\.tokenizer is empty"):
        PackedStream(data, BatchConfig(1, 1), dp_rank=0, dp_size=1, vocab_size=500)


def test_a_stray_module_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "stray_tasks.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HydraError, match="stray_tasks is not an installed package"):
        find_task("stray_tasks:make")


def counting(rng, length, tokenizer, *, start: int = 0) -> list[Document]:
    """A task without a tokenizer."""
    return [Document.all_trainable(start + np.arange(length))]


def test_tasks_of_others_are_registered_by_name_or_by_module():
    name = f"counting-{id(counting)}"
    synthetic_task(name)(counting)
    with pytest.raises(ValueError, match="registered already"):
        synthetic_task(name)(counting)
    part = SourceConfig(kind="synthetic", task=name, options={"start": 3})
    data = DataConfig(blend=(part,), sequence_length=8)
    stream = PackedStream(data, BatchConfig(2, 2), dp_rank=0, dp_size=1, vocab_size=16)
    (batch,) = stream.micro_batches(0)
    assert batch.tokens.tolist() == list(range(3, 11)) * 2
    assert find_task("megatron_hydra.data.synthetic_tasks:needles") is find_task("needles")


def too_long(rng, length, tokenizer) -> list[Document]:
    """A task that breaks its contract."""
    return [Document.all_trainable(np.arange(length + 1))]


def test_a_task_that_breaks_its_contract_is_named():
    with pytest.raises(HydraError, match=r"too_long made 9 tokens where 1\.\.8"):
        generate(too_long, 0, 0, 8, None, {})


def test_one_source_twice_gives_different_samples(qwen):
    part = SourceConfig(kind="synthetic", task="needles")
    data = DataConfig(blend=(part, part), sequence_length=256, tokenizer=qwen)
    stream = PackedStream(data, BatchConfig(1, 2), dp_rank=0, dp_size=1, vocab_size=500)
    first, second = stream.micro_batches(0)
    assert not np.array_equal(first.tokens, second.tokens)


def test_a_length_that_fits_only_some_draws_is_refused_before_training(qwen):
    """Every accepted length must work; the test finds the shortest one by trying."""
    refused: list[str] = []
    for low in range(90, 150, 3):
        part = SourceConfig(
            kind="synthetic", task="needles", options={"document_length": [low, low + 40]}
        )
        data = DataConfig(blend=(part,), sequence_length=1024, tokenizer=qwen)
        try:
            stream = PackedStream(data, BatchConfig(1, 1), dp_rank=0, dp_size=1, vocab_size=500)
        except HydraError as error:
            refused.append(str(error))
            continue
        for step in range(20):
            stream.micro_batches(step)
    assert 0 < len(refused) < 20
    assert all("needles" in message for message in refused)
