"""Any export: ``HYDRA_EXPORT=FOLDER make test-vllm`` compares vLLM's answers with the export's, in fp32.

The size of rounding in a deep model depends on the model. The bound is the difference of the export itself
between one forward over a text and decoding token by token with its cache.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.serving.vllm import engines

engines.need_vllm()

from transformers import AutoTokenizer  # noqa: E402

from megatron_hydra.serving.vllm import register  # noqa: E402

FOLDER = os.environ.get("HYDRA_EXPORT")
NEW = 24
TEXT = Path(__file__).resolve().parents[3] / "README.md"


@pytest.mark.skipif(not FOLDER, reason="HYDRA_EXPORT names no export")
def test_answers():
    register()  # so that no code of the folder is needed
    model = engines.HydraHeadForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(FOLDER)(TEXT.read_text())["input_ids"]
    prompts = [tokens[start : start + n] for start, n in ((0, 3), (50, 40), (7, 333), (100, 1500))]
    rounding = max(_rounding(model, prompt) for prompt in prompts)
    apart = []
    with engines.engine(FOLDER, max_model_len=2048, max_num_batched_tokens=700) as llm:
        for prompt in prompts:
            answer = engines.generate(llm, [prompt], NEW)[0]
            apart.append(engines.check(model, prompt, answer, 4 * rounding))
        for prompt, answer in zip(prompts, engines.generate(llm, prompts, NEW), strict=True):
            apart.append(engines.check(model, prompt, answer, 4 * rounding))
    print(
        f"largest |Δ log probability|: {max(apart):.1e}, the export with its cache {rounding:.1e}"
    )


@torch.no_grad()
def _rounding(model, prompt):
    """The largest |Δ log probability| of a greedy token between runs with and without the cache."""
    given = torch.tensor([prompt])
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = out.sequences[:, len(prompt) :]
    whole = model(out.sequences, use_cache=False).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
    cached = torch.stack(out.logits, dim=1).log_softmax(-1)
    return (whole - cached).gather(2, new[..., None]).abs().max().item()
