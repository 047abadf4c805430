"""Which model is planned for, and the kinds that it is compared with."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from megatron_hydra.checkpoint import store
from megatron_hydra.checkpoint.hf_config import model_from_hf_config, read_hf_config, read_json
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import HeadMap, num_full_attention_heads
from megatron_hydra.planning.shapes import SHAPES

SEED = 0
"""Of the head map that stands in for a missing one."""


def read_model(name: str) -> ModelConfig:
    """A model's shape: a name that ships here, a ``config.json`` or its folder, a Megatron checkpoint.

    Raises:
        HydraError: none of them; the known names are listed.
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
    """A HydraHead model with heads drawn at random: the counts of a map, not its choice."""
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


def layer_wise(dense: ModelConfig, ratio: str) -> ModelConfig:
    """A hybrid of whole layers at the same ratio, evenly spaced."""
    every = dense.num_layers * dense.num_query_heads
    budget = num_full_attention_heads(dense.num_layers, dense.num_query_heads, ratio)
    count = round(dense.num_layers * budget / every)
    full = {(2 * i + 1) * dense.num_layers // (2 * count) for i in range(count)}
    all_heads = tuple(range(dense.num_query_heads))
    heads = tuple(all_heads if layer in full else () for layer in range(dense.num_layers))
    return dataclasses.replace(dense, hydra=HydraConfig(), full_attention_heads=heads)


def model_kinds(model: ModelConfig, ratio: str, head_map: str) -> dict[str, ModelConfig]:
    """The dense model, the layer-wise hybrid and HydraHead.

    Args:
        model: dense, or a hybrid, which is then taken as it is.
        ratio: GDN:FA, where there is neither a hybrid nor a head map.
        head_map: a file, or empty.

    Raises:
        HydraError: the map is for another model.
    """
    dense = model.dense()
    if model.is_hybrid:
        ours = model
    elif head_map:
        ours = dense.with_head_map(HeadMap.load(head_map), HydraConfig())
    else:
        ours = hydrahead(dense, ratio)
    return {"dense": dense, "layer-wise": layer_wise(dense, ratio), "hydrahead": ours}
