"""The planned model, and the kinds of models to compare it with."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

from megatron_hydra.checkpoint import store
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.conversion.hf_config import model_from_hf_config, read_hf_config
from megatron_hydra.errors import HydraError
from megatron_hydra.files import read_json
from megatron_hydra.head_map import HeadMap, num_full_attention_heads, whole_layers

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
"""Hub name → the shape from its ``config.json``; planning needs neither network nor weights."""

SEED = 0
"""Seed of the random head map that replaces a missing one."""


def read_model(name: str) -> ModelConfig:
    """A model's shape: a name that ships here, a ``config.json`` or its folder, a Megatron checkpoint.

    Raises:
        HydraError: it is none of these; lists the known names.
    """
    if name in SHAPES:
        return model_from_hf_config(SHAPES[name], name)
    path = Path(name)
    if path.is_file():
        return model_from_hf_config(read_json(path), str(path))
    if (path / "config.json").is_file():
        return read_hf_config(path)
    if path.is_dir():
        return store.read_model_config(path)
    raise HydraError(
        f"--model {name}: no such file or folder, and not one of the names whose shapes ship here "
        f"({', '.join(SHAPES)}); download its config.json and give its path"
    )


def hydrahead(dense: ModelConfig, ratio: str) -> ModelConfig:
    """A HydraHead model with random FA heads: it has a map's numbers of heads, but not its choice."""
    budget = num_full_attention_heads(dense.num_layers, dense.num_query_heads, ratio)
    places = [
        (layer, head) for layer in range(dense.num_layers) for head in range(dense.num_query_heads)
    ]
    chosen = set(random.Random(SEED).sample(places, budget))
    heads = tuple(
        tuple(head for head in range(dense.num_query_heads) if (layer, head) in chosen)
        for layer in range(dense.num_layers)
    )
    return dataclasses.replace(dense, hydra=HydraConfig(), full_attention_heads=heads)


def layer_wise(dense: ModelConfig, budget: int) -> ModelConfig:
    """A hybrid of whole layers with as many FA heads; FA layers are evenly spaced, at least one."""
    heads = whole_layers(dense.num_layers, dense.num_query_heads, budget)
    return dataclasses.replace(dense, hydra=HydraConfig(), full_attention_heads=heads)


def model_kinds(model: ModelConfig, ratio: str, head_map: str) -> dict[str, ModelConfig]:
    """The dense model, the layer-wise hybrid of the same number of FA heads, and HydraHead.

    Args:
        model: dense, or a hybrid, which is not changed.
        ratio: GDN:FA, if neither a hybrid nor a head map gives the FA heads.
        head_map: a file, or empty.

    Raises:
        HydraError: the map is for another model, or the model is a hybrid that has one.
    """
    dense = model.dense()
    if model.is_hybrid and head_map:
        raise HydraError(
            f"--head-map {head_map}: --model is a hybrid, which already has its heads; remove "
            "--head-map, or give the dense model"
        )
    if model.is_hybrid:
        ours = model
    elif head_map:
        chosen = HeadMap.load(head_map)
        chosen.check_model(dense.identity(), source=head_map)
        ours = dense.with_head_map(chosen, HydraConfig())
    else:
        ours = hydrahead(dense, ratio)
    if ours.switches.mixes_in_every_head:
        budget = num_full_attention_heads(dense.num_layers, dense.num_query_heads, ratio)
    else:
        budget = sum(len(ours.fa_heads(layer)) for layer in range(ours.num_layers))
    return {"dense": dense, "layer-wise": layer_wise(dense, budget), "hydrahead": ours}
