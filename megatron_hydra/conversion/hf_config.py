"""``config.json`` of Hugging Face to and from :class:`~megatron_hydra.config.model.ModelConfig`.

Keys that the model cannot represent raise an error by name; unused keys are kept in
``ModelConfig.hf_config`` and restored on export.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hydra.config.loading import from_dict, to_dict
from megatron_hydra.config.model import HydraConfig, ModelConfig, stored_switches
from megatron_hydra.conversion.families import FAMILIES
from megatron_hydra.errors import HydraError
from megatron_hydra.files import read_json
from megatron_hydra.head_map import HeadMap
from megatron_hydra.hf_identity import DEFAULT_HEAD_DIM, DEFAULT_KV_HEADS, read_config_json

HYBRID_MODEL_TYPE = "hydrahead"
HEAD_MAP_FILE = "head_map.json"

DEFAULT_ROPE_THETA = 10000.0
"""transformers' default for configs without ``rope_theta`` (as of the first Llamas)."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary types whose frequencies do not depend on the current sequence."""

# key -> the values that mean "not in use".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "mlp_bias": (None, False),
    "hidden_act": (None, "silu", "swish"),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "partial_rotary_factor": (None, 1, 1.0),
}

# Keys of the dense config that do not concern the weights but belong into an export.
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")


# -- reading -------------------------------------------------------------------------------------


def read_hf_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The model that ``folder/config.json`` describes: a dense family or an exported hybrid.

    Raises:
        HydraError: an unknown ``model_type``, a setting that the model cannot represent, or a head map of
            another model; names the file and the key.
    """
    model = model_from_hf_config(read_config_json(folder), str(Path(folder) / "config.json"))
    head_map = Path(folder) / HEAD_MAP_FILE
    if model.is_hybrid and head_map.is_file():
        model = dataclasses.replace(model, head_map=_read_head_map(head_map, model))
    return model


def _read_head_map(path: Path, model: ModelConfig) -> dict[str, Any]:
    """Read the head map of an exported hybrid; it must agree with ``config.json``."""
    body = read_json(path)
    head_map = HeadMap.from_dict(body, source=str(path))
    identity = dataclasses.replace(model.identity(), name=str(path.parent))
    head_map.check_model(identity, source=str(path))
    if head_map.full_attention_heads != model.full_attention_heads:
        raise HydraError(
            f"{path}: full_attention_heads differs from config.json in the same folder"
        )
    return body


def model_from_hf_config(config: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Like :func:`read_hf_config`, from the parsed file."""
    model_type = config.get("model_type")
    if model_type not in (HYBRID_MODEL_TYPE, *FAMILIES):
        known = ", ".join([*FAMILIES, HYBRID_MODEL_TYPE])
        raise HydraError(f"{source}: model_type {model_type!r} is not supported (known: {known})")
    for key, neutral in UNSUPPORTED.items():
        if config.get(key) not in neutral:
            raise HydraError(f"{source}: {key} = {config[key]!r} is not supported")
    _refuse_sliding_window(config, source)
    read = _hybrid_fields if model_type == HYBRID_MODEL_TYPE else _dense_fields
    try:
        return ModelConfig(
            num_layers=_required(config, "num_hidden_layers", source),
            hidden_size=_required(config, "hidden_size", source),
            ffn_hidden_size=_required(config, "intermediate_size", source),
            vocab_size=_required(config, "vocab_size", source),
            num_query_heads=_required(config, "num_attention_heads", source),
            norm_eps=_number(config, "rms_norm_eps", source),
            max_position_embeddings=_required(config, "max_position_embeddings", source),
            rope_parameters=read_rope(config, source),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            hf_config=dict(config),
            **read(config, source),
        )
    except HydraError as error:
        text = str(error)
        raise HydraError(text if text.startswith(source) else f"{source}: {text}") from None


def _required(config: Mapping[str, Any], key: str, source: str) -> Any:
    if config.get(key) is None:
        raise HydraError(f"{source}: key {key!r} is missing")
    return config[key]


def _number(config: Mapping[str, Any], key: str, source: str) -> float:
    value = _required(config, key, source)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise HydraError(f"{source}: {key} is {value!r}: it must be a number from 0 to 1")
    return float(value)


def _given(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


def _dense_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    name = config["model_type"]
    family = FAMILIES[name]
    heads = _required(config, "num_attention_heads", source)
    head_dim = DEFAULT_HEAD_DIM[name] or config["hidden_size"] // heads
    bias = bool(config.get("attention_bias", False))
    return {
        "family": name,
        "num_kv_heads": _given(config, "num_key_value_heads", DEFAULT_KV_HEADS[name] or heads),
        "head_dim": _given(config, "head_dim", head_dim),
        "qk_norm": family.qk_norm,
        "qkv_bias": bias if family.qkv_bias is None else family.qkv_bias,
        "out_bias": bias if family.out_bias is None else family.out_bias,
    }


def _hybrid_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    hydra = _required(config, "hydra", source)
    if isinstance(hydra, Mapping):
        hydra = stored_switches(hydra)
    return {
        "family": _required(config, "family", source),
        "num_kv_heads": _required(config, "num_key_value_heads", source),
        "head_dim": _required(config, "head_dim", source),
        "qk_norm": bool(_required(config, "qk_norm", source)),
        "qkv_bias": bool(_required(config, "attention_bias", source)),
        "out_bias": bool(_required(config, "out_bias", source)),
        "hydra": from_dict(HydraConfig, hydra, f"{source}: hydra"),
        "full_attention_heads": _required(config, "full_attention_heads", source),
    }


def _refuse_sliding_window(config: Mapping[str, Any], source: str) -> None:
    layer_types = config.get("layer_types")
    if layer_types and set(layer_types) != {"full_attention"}:
        other = next(kind for kind in layer_types if kind != "full_attention")
        raise HydraError(f"{source}: layer_types holds {other!r}; only full_attention is supported")
    in_use = config.get("use_sliding_window") and config.get("sliding_window") is not None
    first = _given(config, "max_window_layers", 28)
    if in_use and not layer_types and first < _required(config, "num_hidden_layers", source):
        raise HydraError(
            f"{source}: use_sliding_window is on from layer {first} (max_window_layers): "
            "sliding-window attention is not supported"
        )


def read_rope(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Read rotary settings from ``rope_parameters`` (new form) or from the old keys.

    The old keys are ``rope_theta`` and ``rope_scaling``. If a config has both forms, they must agree: a silent
    choice would be wrong for some models.

    Returns:
        transformers 5's ``rope_parameters``: ``rope_type``, ``rope_theta`` and the type's parameters.

    Raises:
        HydraError: an unsupported type, or two forms that differ.
    """
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new and old and _normal_rope(new) != {**_normal_rope(new), **_normal_rope(old)}:
        raise HydraError(f"{source}: rope_parameters and rope_scaling contradict each other")
    rope = _normal_rope(new or old or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise HydraError(f"{source}: rope_parameters that differ by layer type are not supported")
    outer, inner = config.get("rope_theta"), rope.get("rope_theta")
    if outer is not None and inner is not None and float(outer) != float(inner):
        raise HydraError(
            f"{source}: rope_theta is {outer}, rope_parameters.rope_theta is {inner}: remove one"
        )
    chosen = inner if inner is not None else outer
    rope["rope_theta"] = float(DEFAULT_ROPE_THETA if chosen is None else chosen)
    if rope["rope_type"] not in ROPE_TYPES:
        raise HydraError(
            f"{source}: rope_type {rope['rope_type']!r} is not supported "
            f"(supported: {', '.join(ROPE_TYPES)})"
        )
    if rope.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise HydraError(f"{source}: partial_rotary_factor other than 1 is not supported")
    if rope["rope_type"] in ("llama3", "yarn"):
        rope.setdefault(
            "original_max_position_embeddings", _required(config, "max_position_embeddings", source)
        )
    return rope


def _normal_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with the key ``rope_type``, which was ``type`` in the past."""
    body = {key: value for key, value in rope.items() if key not in ("type", "rope_type")}
    return {"rope_type": rope.get("rope_type") or rope.get("type") or "default", **body}


# -- writing -------------------------------------------------------------------------------------


def hf_config_from_model(
    model: ModelConfig, dtype: str, auto_map: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The ``config.json`` of ``model``.

    A dense model with its original config gets it back, key for key, except the dtype. A hybrid is written as
    the finished model (:meth:`ModelConfig.finished`).

    Args:
        dtype: name of the weights' dtype, e.g. ``bfloat16``.
        auto_map: for a hybrid, the place of its modelling code.

    Raises:
        HydraError: the family's config cannot express this model.
    """
    if model.is_hybrid:
        config = _hybrid_config(model, auto_map or {})
        model = model.finished()
    else:
        config = _dense_config(model)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = dtype
    if not same_architecture(model_from_hf_config(config), model):
        raise HydraError(
            f"a {model.family!r} config.json cannot express this model (its biases or norms are "
            "not those of the family)"
        )
    return config


def same_architecture(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configs describe the same network; provenance is not compared."""
    return _architecture(one) == _architecture(other)


def _architecture(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, source={}, hf_config={}, head_map=None)


def _dense_config(model: ModelConfig) -> dict[str, Any]:
    original = model.hf_config
    if original.get("model_type") == model.family and same_architecture(
        model_from_hf_config(original), model
    ):
        return dict(original)
    family = FAMILIES[model.family]
    config = _shared_keys(model) | {
        "architectures": [family.architecture],
        "model_type": model.family,
    }
    if family.qkv_bias is None:
        config["attention_bias"] = model.qkv_bias
    return config


def _hybrid_config(model: ModelConfig, auto_map: Mapping[str, str]) -> dict[str, Any]:
    model = model.finished()
    assert model.full_attention_heads is not None
    return _shared_keys(model) | {
        "architectures": ["HydraHeadForCausalLM"],
        "model_type": HYBRID_MODEL_TYPE,
        "auto_map": dict(auto_map),
        "family": model.family,
        "qk_norm": model.qk_norm,
        "attention_bias": model.qkv_bias,
        "out_bias": model.out_bias,
        "hydra": to_dict(model.switches),
        "full_attention_heads": [list(heads) for heads in model.full_attention_heads],
    }


def _shared_keys(model: ModelConfig) -> dict[str, Any]:
    carried = {key: model.hf_config[key] for key in CARRIED if key in model.hf_config}
    return carried | {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_query_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": dict(model.rope_parameters),
        "tie_word_embeddings": model.tie_embeddings,
    }
