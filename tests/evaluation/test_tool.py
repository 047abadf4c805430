"""tools/evaluate.py, from a folder to a table."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_hydra.config.evaluation import depths_argument
from megatron_hydra.hf.export_files import auto_map, hf_export_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def export(model, tokenizer, tmp_path):
    folder = tmp_path / "export"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": auto_map()}
    (folder / "config.json").write_text(json.dumps(config))
    for name, path in hf_export_files().items():
        shutil.copyfile(path, folder / name)
    return folder


def arguments(folder, output, *more):
    return [
        "--model", str(folder), "--tasks", "niah_single_1", "--lengths", "600,1K", "--output",
        str(output), "--samples", "1", "--depths", "2", "--quiet", "--device", "cpu", *more,
    ]  # fmt: skip


def test_hybrid_needs_the_flag_and_runs_with_it(tool, export, tmp_path, capsys):
    assert tool.main(arguments(export, tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert "--trust-remote-code" in message and "modeling_hydrahead.py" in message
    assert not (tmp_path / "out").exists()

    assert tool.main(arguments(export, tmp_path / "out", "--trust-remote-code")) == 0
    printed = capsys.readouterr().out
    assert "niah_single_1" in printed and "128 bytes a token" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["tasks"]["niah_single_1"]) == {"600", "1024"}
    assert results["cache"]["kv_bytes_per_token"] == 128
    assert (tmp_path / "out" / "heatmap_niah_single_1.png").exists()


def test_plain_model_needs_no_flag(tool, tokenizer, tmp_path, capsys):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    prompts = tmp_path / "ids.jsonl"
    prompts.write_text('{"prompt": [1, 2, 3], "answer": [4]}\n')
    line = arguments(tmp_path / "model", tmp_path / "out")
    line[line.index("niah_single_1")] = str(prompts)
    assert tool.main(line) == 0  # ids need no tokenizer
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["tasks"]["ids"]["600"]["samples"] == 1
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4,
        "original_max_position_embeddings": 64,
    }
    changed = [*line, "--model-config", json.dumps({"rope_parameters": rope})]
    assert (
        tool.main(changed) == 2
    )  # the same weights but another model: --output has another evaluation
    assert tool.main([*changed, "--force"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["rope_parameters"] == rope
    assert tool.main([*line, "--force", "--model-config", '{"rop": 1}']) == 2
    assert "has no key rop" in capsys.readouterr().err
    assert tool.main(arguments(tmp_path / "model", tmp_path / "text")) == 2
    assert "needs the model's tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        (("--tasks", "nope"), "task 'nope' is unknown"),
        (("--lengths", "4X"), "'4X' is not a length"),
        (("--depths", "a,b"), "--depths"),
        (("--depths", "0,2"), "--depths [0.0, 2.0] must be numbers in 0..1"),
        (("--haystack", "/none"), "--haystack /none cannot be read"),
        (("--model-config", "[1]"), "--model-config [1] must be a JSON object"),
        (("--model-config", "x"), "--model-config is not JSON"),
        (("--model", "/none"), "/none is not a folder"),
    ],
)
def test_wrong_flags_are_named_before_a_model_is_loaded(tool, changes, message, tmp_path, capsys):
    assert tool.main([*arguments(tmp_path / "none", tmp_path / "out"), *changes]) == 2
    assert message in capsys.readouterr().err


def test_weights_that_are_no_safetensors_are_refused(tool, export, tmp_path, capsys):
    (export / "model.safetensors").unlink()
    torch.save({}, export / "pytorch_model.bin")
    assert tool.main(arguments(export, tmp_path / "out", "--trust-remote-code")) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_depths_and_lengths():
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert depths_argument("3") == (0.0, 0.5, 1.0)
    assert depths_argument("0.25") == (0.25,) and depths_argument("0,1") == (0.0, 1.0)
    assert [module._length(t) for t in ("512", "4K", "1m")] == [512, 4096, 1024**2]
