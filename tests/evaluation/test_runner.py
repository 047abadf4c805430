from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation import EvaluationSettings, ScoredSample, evaluate
from megatron_hydra.evaluation.runner import FORMAT, summarise
from megatron_hydra.evaluation.scoring import Outcome

SETTINGS = EvaluationSettings(samples=2, depths=(0.0, 0.5, 1.0), cache_length=0, progress=False)
TASKS = ("niah_single_1", "niah_multivalue")


def test_accuracy_by_length_and_depth_with_files(reader, tokenizer, tmp_path):
    out = tmp_path / "eval"
    results = evaluate(reader, tokenizer, TASKS, [2000, 1000], SETTINGS, output=out, name="reader")
    assert results["format"] == FORMAT.name and results["model"] == "reader"
    single = results["tasks"]["niah_single_1"]
    assert list(single) == ["1000", "2000"]
    assert single["1000"]["depths"] == {"0": 1.0, "0.5": 1.0, "1": 1.0}
    assert (single["1000"]["accuracy"], single["2000"]["accuracy"]) == (1.0, 0.0)
    assert single["1000"]["samples"] == 6
    many = results["tasks"]["niah_multivalue"]["1000"]
    assert many["depths"] == {} and many["samples"] == 2 and many["accuracy"] == 1.0
    assert json.loads((out / "results.json").read_text()) == results
    pictures = sorted(p.name for p in out.glob("*.png"))
    assert pictures == ["accuracy.png", "heatmap_niah_single_1.png"]
    assert all((out / p).read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert not list(out.rglob("*.tmp"))
    cell = json.loads((out / "cells" / "niah_single_1--2000.json").read_text())
    assert cell["predictions"][0]["said"].strip() == "nothing"


def test_a_stopped_run_resumes(reader, tokenizer, tmp_path):
    out = tmp_path / "eval"
    first = evaluate(reader, tokenizer, TASKS, [1000, 1200], SETTINGS, output=out)
    calls = reader.calls
    (out / "results.json").unlink()
    (out / "cells" / "niah_multivalue--1200.json").unlink()
    again = evaluate(reader, tokenizer, TASKS, [1000, 1200], SETTINGS, output=out)
    assert reader.calls == calls + 1
    assert _without_seconds(again) == _without_seconds(first)


def _without_seconds(results):
    text = json.dumps(results)
    return json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds"})


def test_another_evaluation_is_not_mixed_in(reader, tokenizer, tmp_path):
    out = tmp_path / "eval"
    evaluate(reader, tokenizer, TASKS[:1], [1000], SETTINGS, output=out)
    other = dataclasses.replace(SETTINGS, seed=9)
    with pytest.raises(HydraError, match=r"another seed \(1234, now 9\)"):
        evaluate(reader, tokenizer, TASKS[:1], [1000], other, output=out)
    reader.weight += 1
    with pytest.raises(HydraError, match="another weights"):
        evaluate(reader, tokenizer, TASKS[:1], [1000], SETTINGS, output=out)
    calls = reader.calls
    evaluate(reader, tokenizer, TASKS[:1], [1000], other, output=out, force=True)
    assert reader.calls > calls
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("keep me")
    with pytest.raises(HydraError, match="not empty and not an evaluation"):
        evaluate(reader, tokenizer, TASKS[:1], [1000], SETTINGS, output=foreign)
    assert (foreign / "thesis.txt").read_text() == "keep me"


class TokenTask:
    """Depths of single answers, and options that do not show in a repr."""

    name = "token task/1"

    def samples(self, request):
        tokens = [5] * request.length
        return [ScoredSample(tokens, [3, 9], [0.1, 0.9])] * request.count


def test_token_tasks_need_no_tokenizer(model, tmp_path):
    results = evaluate(model, None, [TokenTask()], [12, 24], SETTINGS, output=tmp_path / "e")
    cell = results["tasks"]["token task/1"]["12"]
    assert cell["answers"] == 4 and list(cell["depths"]) == ["0", "1"]
    again = evaluate(model, None, [TokenTask()], [12, 24], SETTINGS, output=tmp_path / "e")
    assert again == results  # the same seconds, so nothing was run again
    assert not model.training


def test_depth_bins_are_the_nearest():
    outcomes = [Outcome((1.0, 0.0), (0.1, 0.4), "", ""), Outcome((1.0,), (None,), "", "")]
    cell = summarise(outcomes, (0.0, 0.5))
    assert cell == {"accuracy": 2 / 3, "samples": 2, "answers": 3, "depths": {"0": 1.0, "0.5": 0.0}}
    sample = (0.0,), (None,), "", ""
    assert summarise([Outcome(*sample, True), Outcome(*sample, False)], ())["confused"] == 0.5


def test_nonsense_is_refused(model, tokenizer):
    for tasks, lengths, message in (
        (["vt", "vt"], [2000], "given twice"),
        ([], [2000], "one task and one length"),
        (["vt"], [1], "too short"),
    ):
        with pytest.raises(HydraError, match=message):
            evaluate(model, tokenizer, tasks, lengths, SETTINGS)
    for changes in ({"samples": 0}, {"depths": ()}, {"depths": (1.5,)}):
        with pytest.raises(HydraError):
            EvaluationSettings(**changes)
