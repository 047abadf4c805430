"""On a GPU in 16 bits: vLLM's kernels, and decode steps replayed from CUDA graphs.

The other modules test fp32, which runs the torch code also on a GPU. This module tests the kernels.
"""

from __future__ import annotations

import pytest
import torch

from tests.serving.vllm import engines

engines.need_vllm()

pytestmark = pytest.mark.gpu

LENGTHS = (1, 2, 3, 5, 37, 64, 65, 130, 300)
WIDE = {"hidden_size": 128, "head_dim": 64}
MODELS = {
    "uneven, d 64": WIDE,
    "7:1, d 128": {
        "heads": [[3], [0], [7], [5]],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    "gqa, no FA head, d 64": {"heads": [[], []], "hydra": {"gdn_kv": "gqa"}, **WIDE},
    "no convolution, gated": {"hydra": {"short_conv": False, "fusion": "gated"}, **WIDE},
    "width 2, no position": {"hydra": {"conv_width": 2, "gdn_position": "none"}, **WIDE},
}


@pytest.mark.parametrize("name", MODELS)
def test_graphs(name, tmp_path):
    """Single requests, and batches of sizes that were not captured."""
    model = engines.save_export(tmp_path, dtype=torch.bfloat16, **MODELS[name])
    prompts = engines.random_prompts(LENGTHS)
    with engines.engine(tmp_path, dtype="bfloat16", enforce_eager=False, max_num_seqs=16) as llm:
        for some in (prompts[3:4], prompts[:3], prompts[2:7], prompts):
            for prompt, answer in zip(some, engines.generate(llm, some), strict=True):
                engines.check_rounded(model, prompt, answer)


@pytest.mark.parametrize("tuning", ["off", "full"])
def test_tunings(tuning, tmp_path):
    """The other tests choose once: here the first configurations, and a choice for each number of heads."""
    model = engines.save_export(tmp_path, [[1, 2, 3], [0]], dtype=torch.bfloat16, **WIDE)
    prompts = engines.random_prompts(LENGTHS)
    with engines.engine(
        tmp_path, dtype="bfloat16", additional_config={"hydrahead_tuning": tuning}
    ) as llm:
        for prompt, answer in zip(prompts, engines.generate(llm, prompts), strict=True):
            engines.check_rounded(model, prompt, answer)


@pytest.mark.parametrize("eager", [False, True])
def test_chunks_prefixes_and_preemption(eager, tmp_path):
    """Prefills beside decodes, states copied to other pages, and restarted requests."""
    model = engines.save_export(tmp_path, dtype=torch.bfloat16, **WIDE)
    prefix = engines.random_prompts([800])[0]
    long = [prefix + end for end in engines.random_prompts([1, 7, 40, 90], seed=2)]
    short = engines.random_prompts([1, 433, 2, 150, 31, 64, 65, 129], seed=3)
    with engines.engine(
        tmp_path,
        dtype="bfloat16",
        enforce_eager=eager,
        enable_prefix_caching=True,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=40,
    ) as llm:
        for some in (long[:1], long, short + long):
            for prompt, answer in zip(some, engines.generate(llm, some, 40), strict=True):
                engines.check_rounded(model, prompt, answer)
        assert engines.metric(llm, "prefix_cache_hits") > 0
