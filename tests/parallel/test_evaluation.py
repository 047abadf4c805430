"""Under every layout, a Megatron checkpoint gives the tokens of its Hugging Face export."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from megatron_hydra.checkpoint.store import save_canonical
from megatron_hydra.conversion.convert import megatron_to_hf
from megatron_hydra.hf.modeling_hydrahead import HydraHeadForCausalLM
from tests.parallel.evaluation_task import VOCABULARY
from tests.parallel.launch import ROOT, forked
from tests.parallel.layouts import MODELS, canonical_weights

LAYOUTS = {
    "cp2": (2, "parallel.context=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "tp2-sp-seq": (
        2, "parallel.tensor=2", "parallel.sequence=true", "parallel.fa_partition=sequence",
    ),
    "tp2-sp-pp2": (4, "parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"),
    "tp2-sp-cp2": (4, "parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"),
}  # fmt: skip
PROMPTS = (1, 2, 3, 30, 61)  # three are shorter than the convolution
ANSWER = 9


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_prompts(path: Path, model: HydraHeadForCausalLM) -> None:
    """Of three answers, one is the model's own, one begins like it, and one is wrong from the start."""
    lines = []
    for index, length in enumerate(PROMPTS * 3):
        generator = torch.Generator().manual_seed(index)
        prompt = torch.randint(VOCABULARY, (1, length), generator=generator)
        said = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=ANSWER,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answer = said[0, length:].tolist()
        if index % 3:
            wrong = 0 if index % 3 == 1 else 4
            answer[wrong] = (answer[wrong] + 1) % VOCABULARY
        lines.append(json.dumps({"prompt": prompt[0].tolist(), "answer": answer, "length": 80}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def case(tmp_path_factory, tool):
    """Checkpoint, arguments, and the export's results."""
    root = tmp_path_factory.mktemp("evaluation")
    model = MODELS["uneven"]
    save_canonical(root / "checkpoint", canonical_weights(model), model)
    megatron_to_hf(root / "checkpoint", root / "export")
    write_prompts(root / "ids.jsonl", HydraHeadForCausalLM.from_pretrained(root / "export").eval())
    arguments = [
        "--tasks", f"{root / 'ids.jsonl'},tests.parallel.evaluation_task:make", "--lengths", "80",
        "--samples", "15", "--depths", "1.0", "--batch-tokens", "400", "--quiet",
    ]  # fmt: skip
    hf = ["--model", str(root / "export"), "--trust-remote-code", "--device", "cpu"]
    assert tool.main([*hf, *arguments, "--output", str(root / "hf")]) == 0
    return root / "checkpoint", arguments, predictions(root / "hf")


def predictions(folder: Path) -> dict[str, list]:
    return {
        path.name: json.loads(path.read_text())["predictions"]
        for path in sorted((folder / "cells").glob("*.json"))
    }


def test_one_process_scores_like_the_export(tool, case, tmp_path, capsys):
    checkpoint, arguments, expected = case
    line = ["--checkpoint", str(checkpoint), *arguments, "--output", str(tmp_path / "out")]
    assert tool.main(line) == 0
    assert predictions(tmp_path / "out") == expected
    assert [p["score"] for p in expected["ids--80.json"]] == [1.0, 0.0, 0.0] * len(PROMPTS)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "cache" not in results and results["settings"]["dtype"] == "float32"
    assert "ids" in capsys.readouterr().out


def run_layout(case, layout: tuple, output: Path) -> dict[str, list]:
    checkpoint, arguments, _ = case
    processes, *overrides = layout
    line = ["--checkpoint", str(checkpoint), *arguments, "--output", str(output), *overrides]
    printed = forked("tools.evaluate", processes, *line)
    assert printed.count("results: ") == 1  # only rank 0 prints and writes
    return predictions(output)


@pytest.mark.parallel
def test_tensor_and_sequence_parallel_ranks_score_like_the_export(case, tmp_path):
    layout = (2, "parallel.tensor=2", "parallel.sequence=true")
    assert run_layout(case, layout, tmp_path / "out") == case[2]


@pytest.mark.parallel
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_scores_like_the_export(case, layout, tmp_path):
    assert run_layout(case, LAYOUTS[layout], tmp_path / "out") == case[2]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            ("parallel.tensor=2",),
            "parallel.tensor · context · pipeline = 2·1·1 = 2 processes, one a GPU, but this run has 1",
        ),
        (("parallel.tensr=2",), "did you mean 'tensor'"),
        (("optimizer.lr=1",), "an evaluation accepts only parallel"),
        (("parallel.sequence=true",), "parallel.sequence is true, but parallel.tensor is 1"),
        (("parallel.virtual_pipeline=2",), "set parallel.virtual_pipeline=1"),
        (("parallel.context=0",), "parallel.context is 0"),
        (("--dtype", "fp16"), "--dtype fp16"),
        (("--prefill-chunk", "8"), "--prefill-chunk is for a Hugging Face --model"),
        (("--lm-eval", "arc_easy"), "--lm-eval"),
        (("--config", "/none.yaml"), "config /none.yaml cannot be read"),
        (("--checkpoint", "/none"), "checkpoint /none does not exist"),
    ],
)
def test_a_wrong_layout_is_named(tool, case, changes, message, tmp_path, capsys):
    checkpoint, arguments, _ = case
    line = ["--checkpoint", str(checkpoint), *arguments, "--output", str(tmp_path / "out")]
    assert tool.main([*line, *changes]) == 2
    assert message in capsys.readouterr().err


def test_replicas_are_refused(tool, case, tmp_path, monkeypatch, capsys):
    """Two processes for a layout of one would do the same work and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    checkpoint, arguments, _ = case
    line = ["--checkpoint", str(checkpoint), *arguments, "--output", str(tmp_path / "out")]
    assert tool.main(line) == 2
    assert "there are 2 processes: an evaluation has no data parallelism" in capsys.readouterr().err
