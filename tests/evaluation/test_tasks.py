from __future__ import annotations

import json
import re

import pytest

from megatron_hydra.data.text import distinct_names
from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.finding import load_task, task_names
from megatron_hydra.evaluation.needles import NEW_TOKENS, TASKS, NeedleTask
from megatron_hydra.evaluation.ruler import CommonWords, FrequentWords, VariableTracking
from megatron_hydra.evaluation.tasks import (
    GenerationSample,
    JsonlTask,
    SampleRequest,
    ScoredSample,
    register_task,
)


def request(tokenizer, length=3000, **changes):
    return SampleRequest(
        length=length, count=2, depths=(0.0, 0.5, 1.0), tokenizer=tokenizer, **changes
    )


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_needles_fill_the_length_and_hold_their_answers_once(task, tokenizer):
    samples = task.samples(request(tokenizer))
    assert len(samples) == (6 if task.has_depth else 2)
    for sample in samples:
        used = len(tokenizer(sample.prompt)["input_ids"]) + sample.max_new_tokens
        assert 3000 * 0.9 < used <= 3000
        assert len(sample.answers) == task.num_values * task.num_queries
        facts = dict.fromkeys(re.findall(r"for (\S+) is: (\S+)\.", sample.prompt))
        question = sample.prompt[sample.prompt.rindex("\nWhat") :]
        asked = re.search(r"for ([^?]+) mentioned in the provided text\?", question).group(1)
        names = re.split(r", and |, ", asked)
        found = [value for name, value in facts if name in names]
        assert sorted(found) == sorted(sample.answers)
        assert len(names) == task.num_queries
        assert {value for name, value in facts if name not in names} <= set(sample.others)
        assert not set(sample.others) & set(sample.answers)


def test_the_fact_lies_at_its_depth(tokenizer):
    depths = (0.0, 0.25, 0.5, 1.0)
    task = NeedleTask("t")
    for sample in task.samples(
        SampleRequest(length=6000, count=1, depths=depths, tokenizer=tokenizer)
    ):
        start = sample.prompt.index("\n")
        end = sample.prompt.rindex("\nWhat is")
        place = (sample.prompt.index("One of the special") - start) / (end - start)
        assert abs(place - sample.depth) < 0.05


def test_haystack_of_the_user_is_used(tokenizer):
    (sample,) = NeedleTask("t").samples(
        SampleRequest(
            length=1200,
            count=1,
            depths=(0.5,),
            tokenizer=tokenizer,
            haystack="first line\n\nsecond line\n",
        )
    )
    assert sample.prompt.count("first line") > 5 and sample.prompt.count("second line") > 5


@pytest.mark.parametrize("name", ["niah_multikey_2", "vt", "cwe", "fwe"])
def test_samples_are_decided_by_the_seed_alone(name, tokenizer):
    length = 12_000
    first = load_task(name).samples(request(tokenizer, length))
    assert first == load_task(name).samples(request(tokenizer, length))
    assert first != load_task(name).samples(request(tokenizer, length, seed=5))
    assert len({s.prompt for s in first}) == len(first)


def test_random_state_does_not_depend_on_the_process():
    """A hash of strings would differ, because each process has a new salt."""
    value = SampleRequest(length=9, count=1).rng("task", 0.5, 3).random()
    assert value == 0.11562860290701771


def test_variable_tracking_answers_are_the_chain(tokenizer):
    for sample in VariableTracking(chains=2).samples(request(tokenizer, 4000)):
        question = sample.prompt.rindex("Memorize and track")
        context = sample.prompt[question:]
        (value,) = re.findall(r"assigned the value (\d+), they are:$", context)
        sources = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", context))

        def root(name, sources=sources):
            return root(sources[name]) if name in sources else name

        assert {n for n in sources if root(n) == value} == set(sample.answers)
        assert len(sample.answers) == 5 and len(sources) == 10
        # Every variable is assigned before it is used.
        order = re.findall(r"VAR (\w+) = ", context)
        for name, source in sources.items():
            assert source == sources[order[0]] or source not in order[order.index(name) :]


@pytest.mark.parametrize("length, words_of_name", [(12_000, 1), (40_000, 2)])
def test_common_words_are_the_most_common_ones(length, words_of_name, tokenizer):
    """Variables are single words, which are shorter, if there are enough words."""
    for sample in CommonWords().samples(request(tokenizer, length)):
        used = len(tokenizer(sample.prompt)["input_ids"]) + sample.max_new_tokens
        assert 0.95 * length < used <= length
        assert {len(answer.split("-")) for answer in sample.answers} == {words_of_name}
        context = sample.prompt[sample.prompt.rindex("Below is a numbered list") :]
        words = re.findall(r"\d+\. (\S+)", context)
        ranked = sorted(set(words), key=words.count, reverse=True)
        assert set(ranked[:10]) == set(sample.answers)
        assert words.count(ranked[9]) > words.count(ranked[10])


def test_frequent_words_are_ranked_second_to_fourth(tokenizer):
    for sample in FrequentWords().samples(request(tokenizer, 4000)):
        context = sample.prompt.split("coded words. ")[1].split("\nQuestion")[0].split(" ")
        ranked = sorted(set(context), key=context.count, reverse=True)
        assert ranked[0] == "..." and tuple(ranked[1:4]) == sample.answers
        assert context.count(ranked[3]) > context.count(ranked[4])


def test_names_stay_distinct_beyond_all_two_word_names():
    rng = SampleRequest(length=1, count=1).rng("names")
    names = distinct_names(rng, 20_000, taken={"misty-harbor"})
    assert len(set(names)) == 20_000 and "misty-harbor" not in names
    assert names[-1].count("-") == 2


def test_a_length_too_short_is_refused_by_name(tokenizer):
    with pytest.raises(HydraError, match=r"'niah_single_1' needs at least \d+ prompt tokens"):
        load_task("niah_single_1").samples(request(tokenizer, NEW_TOKENS + 50))
    with pytest.raises(HydraError, match="needs the model's tokenizer"):
        load_task("vt").samples(request(None))


# -- finding tasks --------------------------------------------------------------------------------


class OwnTask:
    name = "own"

    def samples(self, request):
        return [ScoredSample(tokens=range(request.length), answers=[3])]


def test_tasks_are_found_by_name_by_function_and_by_file(tmp_path, monkeypatch):
    register_task("own", OwnTask)
    assert load_task("own").samples(SampleRequest(length=5, count=1))[0].answers == [3]
    assert {"own", "niah_multikey_3", "fwe"} <= set(task_names())
    (tmp_path / "my_tasks.py").write_text(
        "class T:\n    name = 'mine'\n    def samples(self, request):\n        return []\n"
        "def number():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_task("my_tasks:T").name == "mine"
    for spec, message in (
        ("my_tasks:nothing", "cannot be created"),
        ("no_such_module:x", "cannot be created"),
        ("my_tasks:number", "without name and samples"),
        ("niah", "task 'niah' is unknown: use one of"),
        (str(tmp_path / "none.jsonl"), "cannot be read"),
    ):
        with pytest.raises(HydraError, match=message):
            load_task(spec)


def write_rows(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_jsonl_rows_go_to_the_length_they_fit(tmp_path, tokenizer):
    path = write_rows(
        tmp_path / "p.jsonl",
        {"prompt": "a" * 50, "answer": "x", "max_new_tokens": 10},
        {"prompt": "b" * 100, "answer": ["x", "y"], "match": "any", "depth": 0.5},
        {"prompt": [1] * 20, "answer": [4, 5], "length": 200},
    )
    task = JsonlTask(path)
    lengths = (64, 200)
    found = [
        task.samples(SampleRequest(length=n, count=9, tokenizer=tokenizer, lengths=lengths))
        for n in lengths
    ]
    assert [len(rows) for rows in found] == [1, 2]
    assert found[1][0] == GenerationSample("b" * 100, ("x", "y"), "any", 32, 0.5)
    assert found[1][1] == GenerationSample((1,) * 20, (4, 5), "all", 2)
    with pytest.raises(HydraError, match=r"p.jsonl:2 needs 132 tokens"):
        task.samples(SampleRequest(length=64, count=9, tokenizer=tokenizer, lengths=(64,)))


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", ":2 is not JSON"),
        ('{"prompt": "x"}', ":2: a row needs prompt and answer"),
        ('{"prompt": "x", "answer": "y", "depht": 1}', ":2: a row needs prompt and answer"),
        ('{"prompt": "x", "answer": [1]}', ":2: prompt and answer must both"),
        ('{"prompt": [1], "answer": "y"}', ":2: prompt and answer must both"),
        ('{"prompt": "x", "answer": []}', ":2: prompt and answer must both"),
    ],
)
def test_jsonl_errors_name_the_line(line, message, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x", "answer": "y"}\n' + line + "\n")
    with pytest.raises(HydraError, match=message):
        JsonlTask(path)


def test_answer_positions_are_checked():
    for answers, depths in (([0], ()), ([5], ()), ([], ()), ([1, 2], (0.5,))):
        with pytest.raises(HydraError, match=r"answer|depth"):
            ScoredSample(tokens=range(5), answers=answers, depths=depths)
