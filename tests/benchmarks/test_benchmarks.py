"""Every benchmark has a help text and runs from end to end at a toy size on a CPU."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import decode, gdn
from megatron_hydra.errors import HydraError
from tests.hf.models import HEADS, SHAPE, export, make_model

TOY = {
    "gdn": ["--sizes", "64,128", "--heads", "2", "--head-dim", "16"],
    "loss": ["--sizes", "64", "--hidden", "16", "--vocabulary", "300", "--chunk", "32"],
    "fused": ["--sizes", "64", "--head-dim", "16", "--fa", "1", "--gdn", "2"],
    "host": ["--sizes", "1,2", "--profile", "3"],
    "layer": ["--sizes", "64", "--kernels"],
    "step": ["--tiny", "--sizes", "64"],
    "conversion": ["--megabytes", "40"],
    "decode": ["--tiny", "--sizes", "32", "--prefill-sizes", "32", "--chunk", "20",
               "--batch-sizes", "16"],
    "taking_back": ["--layers", "1", "--sizes", "32"],
    "context_parallel": ["--sizes", "128", "--layers", "1", "--hidden", "64"],
    "sharded_gdn": ["--sizes", "128", "--ranks", "2", "--heads", "2", "--head-dim", "16",
                    "--decays", "0.01"],
    "tail_attention": ["--sizes", "64", "--ranks", "2", "--head-dim", "16"],
    "selection": ["--sizes", "4,8", "--layers", "2", "--heads", "4", "--kv-heads", "2",
                  "--hidden", "32", "--prompts", "2"],
    "selection_time": ["--shape", "tiny", "--sizes", "96", "--pairs", "5", "--receivers", "2",
                       "--senders", "1"],
    "data_waste": ["waste", "--sizes", "1K,2K", "--documents", "500"],
    "data_index": ["index", "--sizes", "1000"],
    "data_memory": ["memory", "--sizes", "1", "--workers", "1"],
    "data_shards": ["shards", "--sizes", "3"],
    "data_stream": ["stream", "--sizes", "1K,2K", "--corpus-megabytes", "0.3"],
}  # fmt: skip
"""Name of the report -> flags of a toy run. Every subject of ``data`` has its own report."""
QUICK = (
    "gdn",
    "loss",
    "host",
    "layer",
    "step",
    "tail_attention",
    "selection",
    "selection_time",
    "data_waste",
)


def module_of(report: str) -> str:
    return f"benchmarks.{'data' if report.startswith('data_') else report}"


@pytest.mark.parametrize("name", TOY)
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module_of(name)).main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m {module_of(name)}" in shown
    assert "usage" in shown


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in TOY]
)
def test_runs_at_a_toy_size(name, tmp_path):
    main = importlib.import_module(module_of(name)).main
    flags = ["--device", "cpu", "--repeats", "2", "--warmup", "1", "--output", str(tmp_path)]
    assert main([*flags, *TOY[name]]) == 0
    saved = json.loads((tmp_path / f"{name}.json").read_text())
    assert saved["rows"]
    assert not [row for row in saved["rows"] if row["failure"]]
    assert saved["ratios"] or name == "data_memory"  # it has no peer


def test_another_rule_runs_at_a_toy_size(tmp_path):
    flags = ["--device", "cpu", "--repeats", "2", "--warmup", "1", "--output", str(tmp_path)]
    assert gdn.main([*flags, *TOY["gdn"], "--rule", "kda"]) == 0
    saved = json.loads((tmp_path / "gdn.json").read_text())
    assert {row["peer"] for row in saved["rows"]} == {"ours (torch)"}
    assert not [row for row in saved["rows"] if row["failure"]]
    assert not [row for row in saved["ratios"] if math.isnan(row["median"])]


LLAMA = SHAPE | {"hidden_size": 48}  # a multiple of its heads, as Llama wants


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Flags that name a tiny export and a dense model of its shape."""
    folder = tmp_path_factory.mktemp("pair")
    export(make_model(HEADS, hidden_size=48), folder / "hydra")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder / "dense")
    return ["--hf-path", str(folder / "hydra"), "--dense", str(folder / "dense")]


@pytest.mark.slow
def test_decode_measures_an_export_against_its_teacher(pair, tmp_path):
    flags = ["--device", "cpu", "--repeats", "2", "--warmup", "1", "--output", str(tmp_path)]
    sizes = ["--sizes", "32,64", "--prefill-sizes", "32", "--batch-sizes", "16"]
    assert decode.main([*flags, *pair, *sizes]) == 0
    saved = json.loads((tmp_path / "decode.json").read_text())
    assert not [row for row in saved["rows"] if row["failure"]]
    assert "3 layers, hidden size 48, 9 of 18 heads FA, torch.float32" in saved["notes"]
    cache = {r["size"]: r["median"] for r in saved["ratios"] if r["label"].startswith("cache")}
    assert set(cache) == {32, 64} and cache[64] < cache[32]  # the states are of fixed size


def test_decode_refuses_models_that_are_no_pair(pair, tmp_path):
    def error_of(*flags):
        with pytest.raises(HydraError) as caught:
            decode.opened(*flags, torch.float32, torch.device("cpu"))
        return str(caught.value)

    hydra, dense = pair[1], pair[3]
    assert "is not an export" in error_of(dense, dense)
    LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_hidden_layers": 1})).save_pretrained(tmp_path)
    assert "num_hidden_layers 1, --hf-path" in error_of(hydra, tmp_path)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--hf-path", "a"], "--hf-path needs --dense"),
        (["--dense", "a"], "--dense needs --hf-path"),
        (["--hf-path", "a", "--dense", "b", "--tiny", "--layers", "2"], "--layers, --tiny: the"),
    ],
)
def test_decode_refuses_flags_that_contradict(flags, words, capsys):
    assert decode.main(flags) != 0
    assert words in capsys.readouterr().err
