"""Two tensor-parallel ranks load and compute a checkpoint that one process converted."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_hydra.conversion import parity
from megatron_hydra.conversion.convert import StudentOptions, hf_to_megatron, megatron_to_hf
from tests.checkpoint.models import make_head_map, make_hf
from tests.parallel.converted import LAYOUTS
from tests.parallel.launch import forked


@pytest.mark.parallel
def test_converted_checkpoints_agree_with_transformers_under_tensor_parallelism(tmp_path):
    tokens = torch.arange(64) * 7 % 60
    cases = tmp_path / "cases"
    for variant in ("qwen3-tied", "qwen2"):  # tied, with biases; one vocabulary is a multiple of TP
        hf = make_hf(tmp_path / variant, variant, vocab_size=60)
        hf_to_megatron(hf, cases / f"{variant}-dense")
        head_map = make_head_map(tmp_path / f"{variant}.json", hf)
        options = StudentOptions(head_map=head_map, calibrate=False)
        hf_to_megatron(hf, cases / f"{variant}-hybrid", options)
        megatron_to_hf(cases / f"{variant}-hybrid", tmp_path / f"{variant}-export")
        folders = {"dense": hf, "hybrid": tmp_path / f"{variant}-export"}
        for kind, folder in folders.items():
            logits = parity.hf_logits(folder, tokens)
            save_file({"tokens": tokens, "logits": logits}, cases / f"{variant}-{kind}.safetensors")
    output = forked("tests.parallel.converted", 2, str(cases), timeout=200)
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(results) == 4 * len(LAYOUTS)
    wrong = [result for result in results if not result["error"] < 1e-4]
    assert not wrong, wrong
    print(*results, sep="\n")
