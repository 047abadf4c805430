"""Worker of test_foreign_hybrid.py: a tiny random model of another family, scored on its own words.

It runs in a process of its own, which hides flash-linear-attention from transformers: its kernels need a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.modules["fla"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from transformers import (  # noqa: E402
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tools import evaluate  # noqa: E402

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
PROMPTS, NEW = (1, 2, 3, 30, 61), 8


def make(kind: str):
    torch.manual_seed(0)
    if kind == "qwen3_5":
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SHAPE))
    else:
        model = Qwen3NextForCausalLM(Qwen3NextConfig(**SHAPE, **EXPERTS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def main(kind: str, folder: Path) -> int:
    model = make(kind)
    model.save_pretrained(folder / "model")
    lines = []
    for length in PROMPTS:
        prompt = torch.arange(length)[None] * 7 % 64
        said = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        lines.append(
            {"prompt": prompt[0].tolist(), "answer": said[0, length:].tolist(), "length": 80}
        )
    (folder / "ids.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--model", str(folder / "model"), "--tasks", str(folder / "ids.jsonl")]
    arguments += ["--lengths", "80", "--output", str(folder / "out"), "--cache-length", "64"]
    return evaluate.main([*arguments, "--device", "cpu", "--quiet"])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
