"""Tiny random models of every family, as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.head_map import HeadMap
from megatron_hydra.hf_identity import model_identity_from_hf

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

# One FA head; none; all; both of one group and one of the other.
FULL_ATTENTION_HEADS = ((2,), (), (0, 1, 2, 3), (0, 2, 3))

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _rope(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


VARIANTS = {
    # Where head_dim is given, it is not D/H = 10.
    "qwen3-tied": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": _rope(1e6)},
    ),
    "qwen3-bias": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 8, "attention_bias": True, "rope_parameters": _rope(1e4)},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": _rope(5e5)}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"head_dim": 12, "rope_parameters": LLAMA3_ROPE}),
    "llama-bias-tied": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": _rope(1e4)},
    ),
}


def make_hf(
    folder: Path,
    variant: str = "qwen3-tied",
    dtype: torch.dtype = torch.float32,
    vocab_size: int = SHAPE["vocab_size"],
    **saving: object,
) -> Path:
    """Save a random model whose every parameter differs from its initial constant."""
    model_class, config_class, changes = VARIANTS[variant]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SHAPE, **changes, "vocab_size": vocab_size}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, **saving)
    return folder


def make_head_map(path: Path, hf: Path, heads: tuple = FULL_ATTENTION_HEADS) -> Path:
    """A head map for a folder."""
    identity = model_identity_from_hf(hf)
    HeadMap(model=identity, full_attention_heads=heads, strategy="random", ratio="1:1").save(path)
    return path


def hybrid_config(family: str = "qwen3", **changes: object) -> ModelConfig:
    """The config of a hybrid, without any file; ``hydra`` sets switches."""
    values: dict = {
        "family": family,
        "num_layers": 4,
        "hidden_size": 40,
        "ffn_hidden_size": 56,
        "vocab_size": 61,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "qk_norm": family == "qwen3",
        "full_attention_heads": FULL_ATTENTION_HEADS,
        "hydra": HydraConfig(),
    }
    return ModelConfig(**(values | changes))


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """A random state dict."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
