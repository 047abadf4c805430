"""Shapes of the Qwen3 family, so that planning needs neither network nor weights.

The values are those of the models' public ``config.json`` files on the Hugging Face hub.
"""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936,
    "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 40960, "attention_bias": False, "hidden_act": "silu",
}  # fmt: skip


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, tied: bool) -> dict[str, Any]:
    return _COMMON | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 9728, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 12288, 32, tied=False),
    "Qwen/Qwen3-14B": _qwen3(40, 5120, 17408, 40, tied=False),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 25600, 64, tied=False),
}
"""Hub name → what its ``config.json`` says of the shape."""
