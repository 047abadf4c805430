"""lm-eval on an export, offline: its metrics equal those of log-likelihoods and answers computed by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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


SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "lm_eval_tasks"


def write_shipped(folder, name, rows, changes):
    """A shipped task on rows of a file of its own; further keys replace the file's."""
    lines = (SHIPPED / f"{name}.yaml").read_text().splitlines()
    changes = {"dataset_path": "json", "dataset_kwargs": f"{{data_files: {{test: {name}.jsonl}}}}",
               "test_split": "test", **changes}  # fmt: skip
    kept = [line for line in lines if line.partition(":")[0] not in {"dataset_name", *changes}]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    body = [*kept, *(f"{key}: {value}" for key, value in changes.items())]
    (folder / f"{name}.yaml").write_text("\n".join(body) + "\n")


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
    with pytest.raises(HydraError, match=r"--lm-eval-include .*gone is not a folder"):
        lm_eval_suite.run_lm_eval(model, tokenizer, "tiny_choice", include=str(tmp_path / "gone"))
    with pytest.raises(HydraError, match="needs the model's tokenizer"):
        lm_eval_suite.run_lm_eval(model, None, "tiny_choice", include=str(folder))


@needs_lm_eval
@pytest.mark.slow
def test_our_tasks_score_as_by_hand(model, tokenizer, tmp_path, monkeypatch):
    """The options in all orders, generated answers and bits of code, on rows of our own."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    questions = [(q, [c.strip() for c in choices], a) for q, choices, a in QUESTIONS]
    rows = [{"q": q, "choices": c, "gold": a} for q, c, a in questions]
    fields = {"doc_to_text": '"{{q}}"', "doc_to_choice": "choices", "doc_to_target": "gold"}
    right, same, texts_right, norm_right = [], [], [], []
    for question, choices, gold in questions:
        n, picked, picked_texts, picked_norm = len(choices), [], [], []
        for shift in range(n):
            turned = choices[shift:] + choices[:shift]
            listed = "".join(f"\n{x}. {option}" for x, option in zip("ABC", turned, strict=False))
            prompt = f"{question}{listed}\nAnswer:"
            by_letter = [log_likelihood(model, tokenizer, prompt, f" {x}") for x in "ABC"[:n]]
            by_text = [log_likelihood(model, tokenizer, prompt, f" {option}") for option in turned]
            by_norm = [log / len(option) for log, option in zip(by_text, turned, strict=True)]
            picked.append(turned[by_letter.index(max(by_letter))])
            picked_texts.append(turned[by_text.index(max(by_text))])
            picked_norm.append(turned[by_norm.index(max(by_norm))])
        right.append(sum(option == choices[gold] for option in picked) / n)
        texts_right.append(sum(option == choices[gold] for option in picked_texts) / n)
        norm_right.append(sum(option == choices[gold] for option in picked_norm) / n)
        same.append(len(set(picked)) == 1)
    write_shipped(tmp_path, "sciq_letters", rows, fields)
    write_shipped(tmp_path, "sciq_texts", rows, fields)

    prompts = ["Question: grass?\nAnswer:", "Question: rain?\nAnswer:"]
    said = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=4, do_sample=False)
        said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    answers = [{"question": q, "aliases": a} for q, a in
               (("grass?", ["green", said[0]]), ("rain?", ["something else"]))]  # fmt: skip
    write_shipped(tmp_path, "triviaqa_answers", answers, {
        "num_fewshot": 0, "fewshot_config": "null", "doc_to_target": "aliases",
        "generation_kwargs": "{until: [], do_sample: false, max_gen_toks: 4}",
    })  # fmt: skip
    code = [{"prompt": "def one():\n", "canonical_solution": "    return 1\n"},
            {"prompt": "def two():\n    ", "canonical_solution": "return 2\n"}]  # fmt: skip
    write_shipped(tmp_path, "humaneval_bits", code, {})
    logs = [
        log_likelihood(model, tokenizer, f"def {name}():", f"\n    return {value}\n")
        for name, value in (("one", 1), ("two", 2))
    ]

    monkeypatch.chdir(tmp_path.parent)  # data_files are relative to the folder of the tasks
    settings = EvaluationSettings(
        lm_eval=("sciq_letters", "sciq_texts", "triviaqa_answers", "humaneval_bits"),
        lm_eval_include=tmp_path.name,
        cache_length=0,
        progress=False,
    )
    found = evaluate(model, tokenizer, [], [], settings)["lm_eval"]["tasks"]
    assert found["sciq_letters"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert found["sciq_letters"]["same_choice,none"] == pytest.approx(sum(same) / len(same))
    assert 0 < found["sciq_letters"]["acc,none"] < 1
    assert found["sciq_texts"]["acc,none"] == pytest.approx(sum(texts_right) / len(texts_right))
    assert found["sciq_texts"]["acc_norm,none"] == pytest.approx(sum(norm_right) / len(norm_right))
    assert texts_right != norm_right  # or one would do
    assert found["triviaqa_answers"]["exact_match,none"] == 0.5
    bits = -sum(logs) / math.log(2) / len("\n    return 1\n\n    return 2\n")
    assert found["humaneval_bits"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)

    write_shipped(tmp_path, "sciq_letters", rows, fields | {"num_fewshot": 1})
    with pytest.raises(HydraError, match="sciq_letters: num_fewshot must be 0"):
        lm_eval_suite.run_lm_eval(model, tokenizer, "sciq_letters", include=str(tmp_path))


@needs_lm_eval
@pytest.mark.slow
def test_log_likelihoods_of_a_bf16_model_are_added_in_fp32(tokenizer, tmp_path, monkeypatch):
    """All tokens have logit 1 but "b", which has the next number of bf16: options of "a" and "b" do not tie."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    config = LlamaConfig(
        vocab_size=257, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    (b,) = tokenizer("b")["input_ids"]
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()  # hidden states are the embeddings: ones
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight.zero_()[:, 0] = 1
        model.lm_head.weight[b, 0] = 1 + 2**-7
    rows = [{"question": "x", "choices": ["aaaa", "aaab"], "answer": 1}]
    (tmp_path / "choice.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(file="choice.jsonl"))
    found = lm_eval_suite.run_lm_eval(
        model.bfloat16(), tokenizer, "tiny_choice", include=str(tmp_path)
    )
    assert found["tiny_choice"]["acc,none"] == 1.0


@needs_lm_eval
@pytest.mark.slow
def test_batches_hold_a_number_of_tokens_and_are_halved_where_memory_is_short(
    model, tokenizer, caplog
):
    from lm_eval.api.instance import Instance

    from megatron_hydra.evaluation.lm_eval_model import BatchedByTokens

    pairs = [("word " * n, "answer"[: 1 + n % 6]) for n in range(1, 13)]
    scored = [Instance("loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    until = {"until": [], "do_sample": False, "max_gen_toks": 4}
    written = [
        Instance("generate_until", doc={}, arguments=(text, until), idx=0) for text, _ in pairs
    ]
    shapes, most = [], [1000]

    def record(_module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        if len(ids) > most[0]:
            raise torch.OutOfMemoryError("played")
        shapes.append(tuple(ids.shape))

    with model.register_forward_pre_hook(record, with_kwargs=True):
        alone = BatchedByTokens(model, tokenizer, 1)
        wanted = alone.loglikelihood(scored, disable_tqdm=True)
        assert {rows for rows, _ in shapes} == {1}
        texts = alone.generate_until(written, disable_tqdm=True)
        shapes.clear()
        together = BatchedByTokens(model, tokenizer, 200)
        found = together.loglikelihood(scored, disable_tqdm=True)
        assert all(rows * width <= 200 for rows, width in shapes)
        assert max(rows for rows, _ in shapes) == 3  # of the longest request, 60 tokens and one
        assert [log for log, _ in found] == pytest.approx([log for log, _ in wanted], abs=1e-4)
        shapes.clear()
        assert together.generate_until(written, disable_tqdm=True) == texts
        assert max(rows for rows, _ in shapes) == 3
        mixed = [*written, Instance("generate_until", {}, ("w", until | {"max_new_tokens": 90}), 0)]
        mixed[-1].arguments[1].pop("max_gen_toks")
        shapes.clear()
        together.generate_until(mixed, disable_tqdm=True)
        # The longest prompt has 60 tokens, the longest continuation 90.
        assert max(rows for rows, _ in shapes) == 1
        texts_of = [
            Instance("loglikelihood_rolling", doc={}, arguments=(t,), idx=0) for t, _ in pairs
        ]
        sums = alone.loglikelihood_rolling(texts_of, disable_tqdm=True)
        shapes.clear()
        assert together.loglikelihood_rolling(texts_of, disable_tqdm=True) == pytest.approx(
            sums, abs=1e-3
        )
        assert max(rows for rows, _ in shapes) == 3
        assert all(rows * width <= 200 for rows, width in shapes)
        shapes.clear()
        most[0] = 2
        assert (
            BatchedByTokens(model, tokenizer, 560).generate_until(written, disable_tqdm=True)
            == texts
        )
        assert max(rows for rows, _ in shapes) == 2
        shapes.clear()
        short = BatchedByTokens(model, tokenizer, 500)
        found = short.loglikelihood(scored, disable_tqdm=True)
        assert [log for log, _ in found] == pytest.approx([log for log, _ in wanted], abs=1e-4)
        assert max(rows for rows, _ in shapes) == 2
        assert "batches of 2 requests" in caplog.text
        most[0] = 0
        with pytest.raises(HydraError, match="a single request does not fit"):
            short.loglikelihood(scored, disable_tqdm=True)


def test_without_lm_eval_the_extra_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    settings = EvaluationSettings(lm_eval=("arc_easy",), cache_length=0, progress=False)
    with pytest.raises(HydraError, match=r"'\.\[eval\]'"):
        evaluate(model, tokenizer, [], [], settings)
