"""Every generator, with a byte and with a BPE tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hydra.data.text import NOISE
from megatron_hydra.errors import HydraError
from megatron_hydra.selection import DEFAULT_TASKS, PromptPair, register_capability
from megatron_hydra.selection.capabilities import GROUPS, NOUNS, make_capability
from tests.selection.helpers import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> list[Any]:
    texts = [" ".join(NOUNS), NOISE, "The special magic number for is 12345. " * 3]
    return [byte_tokenizer(), byte_tokenizer(texts, merges=200)]


def test_the_default_capabilities_are_the_papers_two() -> None:
    assert tuple(GROUPS) == DEFAULT_TASKS == ("retrieval", "general")
    assert [len(tasks) for tasks in GROUPS.values()] == [5, 5]


@pytest.mark.parametrize(
    "task", [*sum(GROUPS.values(), ()), "needle_multi:haystack=noise,keys=6,tokens=900"]
)
def test_pairs_are_aligned_reproducible_and_differ_little(task: str, tokenizers: list[Any]) -> None:
    for tokenizer in tokenizers:
        capability = make_capability(task, probe_tokens=700)
        pairs = capability.prompts(tokenizer, len(tokenizer), 6, seed=1)
        assert len(set(pairs)) == 6
        again = make_capability(task, probe_tokens=700)
        assert pairs == again.prompts(tokenizer, len(tokenizer), 6, seed=1)
        assert pairs != again.prompts(tokenizer, len(tokenizer), 6, seed=2)
        for pair in pairs:
            changed = sum(a != b for a, b in zip(pair.clean, pair.corrupted, strict=True))
            assert 0 < changed <= 40
            assert len(pair.answer) == len(pair.wrong)


def test_the_clean_prompt_holds_the_fact_and_the_corrupted_one_does_not(tokenizers) -> None:
    tokenizer = tokenizers[0]
    for task in ("needle_single", "needle_multi", "needle_multi:haystack=needles"):
        for pair in make_capability(task, 900).prompts(tokenizer, len(tokenizer), 3, 0):
            clean, corrupted = tokenizer.decode(pair.clean), tokenizer.decode(pair.corrupted)
            question = clean.rsplit("number for ", 1)[1]
            name, begun = question.split(" mentioned in the provided text is:")  # shared digits
            fact = f"numbers for {name} is:{begun}"
            assert fact + tokenizer.decode(pair.answer) in clean
            assert fact + tokenizer.decode(pair.answer) not in corrupted
            assert fact + tokenizer.decode(pair.wrong) in corrupted
    for pair in make_capability("code").prompts(tokenizer, len(tokenizer), 4, 0):
        clean, corrupted = tokenizer.decode(pair.clean), tokenizer.decode(pair.corrupted)
        name = clean.split("assert ")[1].split(" ==")[0]
        begun = clean.split("==")[1]
        assert f" {name} ={begun}{tokenizer.decode(pair.answer)}" in clean
        assert f" {name} ={begun}{tokenizer.decode(pair.wrong)}" in corrupted


def test_needle_prompts_have_about_the_asked_length(tokenizers) -> None:
    for haystack in ("noise", "filler", "text", "needles"):
        by_option = make_capability(f"needle_single:tokens=1600,haystack={haystack}")
        by_default = make_capability(f"needle_single:haystack={haystack}", probe_tokens=1600)
        for task in (by_option, by_default):
            for pair in task.prompts(tokenizers[1], len(tokenizers[1]), 3, 0):
                assert 1500 < len(pair.clean) < 1750


def test_a_sequence_continues_at_its_own_distance(tokenizers) -> None:
    tokenizer = tokenizers[0]
    for pair in make_capability("sequence:terms=4").prompts(tokenizer, len(tokenizer), 5, 0):
        for prompt, answer in ((pair.clean, pair.answer), (pair.corrupted, pair.wrong)):
            *terms, last = (tokenizer.decode(prompt) + tokenizer.decode(answer)).split(", ")
            numbers = [int(term) for term in (*terms, last)]
            assert len(numbers) == 5 and len(set(np.diff(numbers))) == 1


def test_a_haystack_of_the_users_text(tmp_path: Path, tokenizers) -> None:
    (tmp_path / "book.txt").write_text("call me ishmael some years ago " * 400)
    task = f"needle_multi:haystack=text,path={tmp_path / 'book.txt'},tokens=900"
    pair = make_capability(task).prompts(tokenizers[0], len(tokenizers[0]), 1, 0)[0]
    assert "ishmael" in tokenizers[0].decode(pair.clean)
    missing = make_capability(f"needle_single:haystack=text,tokens=900,path={tmp_path / 'none'}")
    with pytest.raises(HydraError, match=r"none' cannot be read"):
        missing.prompts(tokenizers[0], len(tokenizers[0]), 1, 0)


def test_induction_needs_no_tokenizer() -> None:
    for pair in make_capability("induction:length=8").prompts(None, 20, 10, 0):
        segment, tail = pair.clean[:8], pair.clean[8:]
        assert len(set(segment)) == 8
        assert segment[: len(tail)] == tail
        assert (segment[len(tail)],) == pair.answer
        there = pair.corrupted[:8].index(tail[-1])
        assert (pair.corrupted[there + 1],) == pair.wrong


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("nothing", "no such task; there are arithmetic, code"),
        ("needle_single:path=book.txt", "path=FILE needs haystack=text"),
        ("induction:lenght=3", "no option 'lenght'; there are length"),
        ("needle_multi:keys=1", "keys must be a number of at least 2"),
        ("needle_multi:keys=999", "keys can be at most 64"),
        ("needle_multi:keys", "'keys' is not key=value"),
        ("needle_single:haystack=hay", "haystack must be one of"),
        ("jsonl", "write jsonl:PATH"),
    ],
)
def test_invalid_tasks_are_refused_by_name(task: str, message: str) -> None:
    with pytest.raises(HydraError, match=message):
        make_capability(task)


def test_missing_parts_of_a_model_are_named(tmp_path: Path, tokenizers) -> None:
    with pytest.raises(HydraError, match="no tokenizer"):
        make_capability("facts").prompts(None, 300, 2, 0)
    with pytest.raises(HydraError, match="at most the 10 tokens"):
        make_capability("induction").prompts(None, 10, 2, 0)
    (tmp_path / "p.jsonl").write_text(
        '{"clean": [1, 900], "corrupted": [1, 2], "answer": 3, "wrong_answer": 4}'
    )
    with pytest.raises(HydraError, match="token id 900 is outside the model's vocabulary of 50"):
        make_capability(f"jsonl:{tmp_path / 'p.jsonl'}").prompts(None, 50, 2, 0)
    # Only ten two-digit sums exist, so eleven different prompts are impossible.
    with pytest.raises(HydraError, match="could be aligned"):
        make_capability("arithmetic").prompts(tokenizers[0], 10, 2, 0)


def test_a_registered_capability_is_a_task() -> None:
    @dataclasses.dataclass(frozen=True)
    class Fixed:
        name: str
        token: int

        def prompts(self, tokenizer, vocab_size, count, seed) -> list[PromptPair]:
            return [PromptPair((self.token, 1), (self.token, 2), (3,), (4,))]

    register_capability("fixed", lambda task, options: Fixed(task, int(options["token"])))
    capability = make_capability("fixed:token=7")
    assert capability.name == "fixed:token=7"
    assert capability.prompts(None, 10, 1, 0)[0].clean == (7, 1)
