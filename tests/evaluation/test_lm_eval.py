"""lm-eval on an export, offline: its accuracy equals one from log-likelihoods computed by hand."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation import EvaluationSettings, evaluate, lm_eval_suite

QUESTIONS = [
    ("The grass is", [" green.", " a number of seven digits."], 0),
    ("Two and two are", [" four", " five", " blue"], 1),
    ("A ship was painted", [" red", " white with stripes"], 0),
    ("Rain falls", [" up.", " down."], 1),
    ("The tide", [" waits for the harbour.", " comes and goes."], 1),
    ("Count:", [" 1 2 3 4", " 1 2 3 5", " 9"], 2),
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def folder(tmp_path):
    """lm-eval's task, as a user would write one."""
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    file = tmp_path / "choice.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_choice.yaml").write_text(TASK.format(file=file))
    return tmp_path / "tasks"


def log_likelihood(model, tokenizer, question: str, choice: str) -> float:
    prompt = tokenizer(question)["input_ids"]
    ids = torch.tensor([prompt + tokenizer(choice)["input_ids"]])
    with torch.no_grad():
        logs = model(ids).logits[0].log_softmax(-1)
    target = ids[0, len(prompt) :]
    return float(logs[len(prompt) - 1 : -1].gather(1, target[:, None]).sum())


needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="needs lm-evaluation-harness: pip install -e '.[eval]'",
)


@needs_lm_eval
@pytest.mark.slow
def test_accuracy_is_that_of_our_own_log_likelihoods(
    model, tokenizer, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    right = []
    for question, choices, answer in QUESTIONS:
        scores = [log_likelihood(model, tokenizer, question, choice) for choice in choices]
        right.append(float(max(range(len(choices)), key=scores.__getitem__) == answer))
    assert 0 < sum(right) < len(right)  # otherwise equal accuracies would prove nothing
    settings = EvaluationSettings(
        lm_eval=("tiny_choice",), lm_eval_include=str(folder), progress=False
    )
    results = evaluate(model, tokenizer, [], [], settings, output=tmp_path / "out")
    metrics = results["lm_eval"]["tasks"]["tiny_choice"]
    assert metrics["acc,none"] == pytest.approx(sum(right) / len(right))
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["lm_eval"] == results["lm_eval"]
    assert written["lm_eval"]["version"] == lm_eval_suite.lm_eval_version()

    monkeypatch.setattr("megatron_hydra.evaluation.runner.run_lm_eval", None)  # it is not run again
    assert evaluate(model, tokenizer, [], [], settings, output=tmp_path / "out") == results

    with pytest.raises(HydraError, match="has no task 'no_such_task'"):
        lm_eval_suite.run_lm_eval(model, tokenizer, "no_such_task", include=str(folder))
    with pytest.raises(HydraError, match="needs the model's tokenizer"):
        lm_eval_suite.run_lm_eval(model, None, "tiny_choice", include=str(folder))


def test_without_lm_eval_the_extra_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    settings = EvaluationSettings(lm_eval=("arc_easy",), cache_length=0, progress=False)
    with pytest.raises(HydraError, match=r"'\.\[eval\]'"):
        evaluate(model, tokenizer, [], [], settings)
