"""Every kind of layer and switch: vLLM's greedy answers are the transformers export's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.serving.vllm import engines

engines.need_vllm()

LENGTHS = (1, 2, 3, 5, 37, 130, 300)
FP32 = 5e-5
ROPE = engines.SHAPE["rope_parameters"]
LLAMA3 = {
    **ROPE,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4}

MODELS = {
    "uneven": {},
    "even 7:1": {"heads": [[3], [0], [7], [5]], **EIGHT},
    "3:1": {"heads": [[1, 3], [0, 2], [6, 7], [4, 5]], **EIGHT},
    "no FA head": {"heads": [[], []]},
    "no GDN head": {"heads": [[0, 1, 2, 3, 4, 5]] * 2},
    "multi-head": {"num_key_value_heads": 6},
    "one KV head": {"num_key_value_heads": 1},
    "biases, no q/k norm": {"attention_bias": True, "out_bias": True, "qk_norm": False},
    "tied embeddings": {"tie_word_embeddings": True},
    "scaled rotary": {"rope_parameters": LLAMA3, "hydra": {"fa_position": "both"}},
    "rotary in every second layer": {"hydra": {"fa_rotary_every": 2}},
    "shared qkv": {"hydra": {"qkv": "shared"}},
    "shared qkv, gqa": {"hydra": {"qkv": "shared", "gdn_kv": "gqa"}},
    "gqa": {"hydra": {"gdn_kv": "gqa", "fa_gate_bias": True}},
    "gated fusion": {"hydra": {"fusion": "gated", "fa_position": "rope"}},
    "concat fusion": {"hydra": {"fusion": "concat", "fusion_norm": "none", "fa_position": "none"}},
    "no gates, no convolution": {
        "hydra": {"fa_gate": False, "gdn_gate": False, "short_conv": False, "gdn_position": "none"}
    },
    "width 2": {"hydra": {"conv_width": 2, "log_scale_a": 20.0}},
    "width 1": {"hydra": {"conv_width": 1}},
    "width 6": {"hydra": {"conv_width": 6}},
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers(name, tmp_path):
    model = engines.save_export(tmp_path, **MODELS[name])
    prompts = engines.random_prompts(LENGTHS)
    with engines.engine(tmp_path) as llm:
        for prompt in prompts:  # alone
            engines.check(model, prompt, engines.generate(llm, [prompt])[0], FP32)
        for prompt, answer in zip(prompts, engines.generate(llm, prompts), strict=True):  # together
            engines.check(model, prompt, answer, FP32)


def test_bf16(tmp_path):
    """The rounding is bf16's: vLLM's answers are as far from fp32 as the export's own answers."""
    model = engines.save_export(tmp_path, dtype=torch.bfloat16)
    prompts = engines.random_prompts(LENGTHS)
    with engines.engine(tmp_path, dtype="bfloat16") as llm:
        for prompt, answer in zip(prompts, engines.generate(llm, prompts), strict=True):
            engines.check_rounded(model, prompt, answer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the fused kernels")
@pytest.mark.parametrize("what", ["engine", "rule"])
def test_fused_kernels(what, tmp_path):
    """The small kernels of a layer on a GPU, in Triton's interpreter, which wants a process of its own."""
    folder = [tmp_path / "export"] if what == "engine" else []
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.vllm.interpreted", what, *folder],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "as expected" in done.stdout
