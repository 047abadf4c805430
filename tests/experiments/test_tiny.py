from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_hydra.evaluation.finding import load_task
from megatron_hydra.evaluation.tasks import SampleRequest
from megatron_hydra.experiments.tiny import write_inputs
from megatron_hydra.hf_loading import find_tokenizer
from megatron_hydra.quickstart.shipped import shipped_teacher


@pytest.fixture(scope="module")
def tokenizer():
    return find_tokenizer(shipped_teacher())


def samples(name, tokenizer, seed=0, length=256):
    task = load_task(f"megatron_hydra.experiments.tiny:{name}")
    return task.samples(SampleRequest(length=length, count=4, seed=seed, tokenizer=tokenizer))


@pytest.mark.parametrize(
    "name, answers", [("single", 1), ("facts", 8), ("copying", 16), ("text", 32)]
)
def test_tasks_ask_as_many_questions_as_they_say(name, answers, tokenizer):
    drawn = samples(name, tokenizer)
    assert [len(s.tokens) for s in drawn] == [256] * 4
    assert [len(s.answers) for s in drawn] == [answers] * 4
    assert all(list(s.answers) == sorted(set(s.answers)) for s in drawn)
    again = samples(name, tokenizer)
    assert [list(s.tokens) for s in drawn] == [list(s.tokens) for s in again]
    assert [list(s.tokens) for s in drawn] != [list(s.tokens) for s in samples(name, tokenizer, 1)]


def test_copied_answers_are_told_by_what_came_before(tokenizer):
    for sample in samples("copying", tokenizer):
        tokens = np.array(sample.tokens)
        for place in sample.answers:
            before = np.flatnonzero(tokens[: place - 1] == tokens[place - 1])
            assert before.size and tokens[before[-1] + 1] == tokens[place]


def read_question(path):
    return set(json.loads(path.read_text().splitlines()[0]))


def test_inputs_of_selection_and_calibration(tmp_path):
    write_inputs(tmp_path, shipped_teacher(), seed=3, prompts=5)
    assert len((tmp_path / "selection.jsonl").read_text().splitlines()) == 5
    assert (tmp_path / "calibration.jsonl").stat().st_size
    assert read_question(tmp_path / "selection.jsonl") == {
        "clean",
        "corrupted",
        "answer",
        "wrong_answer",
    }
