from __future__ import annotations

import json
import re

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.finding import load_task
from megatron_hydra.evaluation.qa import NEW_TOKENS, read_questions
from megatron_hydra.evaluation.scoring import text_score
from megatron_hydra.evaluation.tasks import SampleRequest

PARAGRAPHS = [f"Town {n} lies on river {n} and has {n} bridges." for n in range(40)]


def squad():
    def paragraph(n):
        answers = [{"text": f"river {n}"}, {"text": f"the river {n}"}]
        asked = {"question": f"Where is town {n}?", "answers": answers, "is_impossible": False}
        never = {"question": "Why?", "answers": [], "is_impossible": True}
        return {"context": PARAGRAPHS[n], "qas": [asked, never]}

    return {"data": [{"paragraphs": [paragraph(n + m) for m in range(4)]} for n in range(0, 40, 4)]}


def hotpot():
    return [
        {
            "question": f"Where is town {n}?",
            "answer": f"river {n}",
            "context": [[f"Town {n}", [PARAGRAPHS[n]]], [f"Other {n}", ["First. ", "Second."]]],
        }
        for n in range(40)
    ]


def lines():
    return [
        {"question": f"Where is town {n}?", "answer": f"river {n}", "documents": [PARAGRAPHS[n]]}
        for n in range(40)
    ]


@pytest.fixture(params=["squad", "hotpot", "lines"])
def path(request, tmp_path):
    if request.param == "lines":
        file = tmp_path / "towns.jsonl"
        file.write_text("\n".join(json.dumps(line) for line in lines()))
    else:
        file = tmp_path / "towns.json"
        file.write_text(json.dumps({"squad": squad, "hotpot": hotpot}[request.param]()))
    return file


def drawn(path, tokenizer, length=2000, count=3, seed=0):
    task = load_task(f"qa:{path}")
    assert task.name == "qa_towns"
    return task.samples(SampleRequest(length=length, count=count, seed=seed, tokenizer=tokenizer))


def test_the_answer_is_among_numbered_documents_that_fill_the_length(path, tokenizer):
    for number, sample in enumerate(drawn(path, tokenizer)):
        used = len(tokenizer(sample.prompt)["input_ids"]) + sample.max_new_tokens
        assert 0.85 * 2000 < used <= 2000
        assert (sample.max_new_tokens, sample.match) == (NEW_TOKENS, "any")
        documents = re.findall(r"^Document (\d+):$", sample.prompt, re.MULTILINE)
        assert documents == [str(i) for i in range(1, len(documents) + 1)]
        assert sample.prompt.count(PARAGRAPHS[number]) == 1
        assert sample.prompt.endswith(f"Question: Where is town {number}? Answer:")
        assert sample.answers[0] == f"river {number}"
        assert text_score(sample, f" It is RIVER {number}.") == 1.0
        assert text_score(sample, " the sea") == 0.0


def test_seed_decides_the_order_of_the_documents(path, tokenizer):
    first, again, other = (
        [s.prompt for s in drawn(path, tokenizer, seed=seed)] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_the_article_comes_before_other_distractors(tmp_path, tokenizer):
    file = tmp_path / "towns.json"
    file.write_text(json.dumps(squad()))
    (sample,) = drawn(file, tokenizer, length=580, count=1)
    present = [n for n in range(40) if PARAGRAPHS[n] in sample.prompt]
    assert 0 in present and len(present) > 1 and set(present) <= {0, 1, 2, 3}


def test_a_small_file_is_repeated_to_fill_the_length(tmp_path, tokenizer):
    file = tmp_path / "towns.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines()[:2]))
    samples = drawn(file, tokenizer)
    assert len(samples) == 2
    assert samples[0].prompt.count(PARAGRAPHS[0]) > 5


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.json", "{", "not JSON"),
        ("a.json", '{"data": [{"title": "x"}]}', "paragraphs"),
        ("a.json", '[{"question": "x"}]', "context"),
        ("a.jsonl", '{"question": "x", "answer": "y"}', "documents"),
        ("a.jsonl", '{"question": "x", "answer": [], "documents": ["d"]}', "without an answer"),
        ("a.jsonl", "", "has no question"),
        ("a.json", '{"data": []}', "has no question"),
    ],
)
def test_invalid_questions_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(HydraError, match=words) as caught:
        read_questions(tmp_path / name)
    assert name in str(caught.value)


def test_missing_file_and_short_length(tmp_path, tokenizer):
    with pytest.raises(HydraError, match=r"gone\.json cannot be read"):
        load_task(f"qa:{tmp_path / 'gone.json'}")
    file = tmp_path / "towns.jsonl"
    file.write_text(json.dumps(lines()[0]))
    with pytest.raises(HydraError, match="use a longer length"):
        drawn(file, tokenizer, length=100)
