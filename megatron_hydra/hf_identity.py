"""The identity of a Hugging Face model for head maps: shape and fingerprint of its attention.

    identity = model_identity_from_hf(path_or_model, config=None, name="", revision="")

It needs neither Megatron nor the whole model in memory: from a folder it reads ``config.json`` and, lazily, the
attention projections of the first and the last layer. Selection and conversion both call it, so every reader of
a map can refuse it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.files import read_json
from megatron_hydra.head_map import ModelIdentity, fingerprint_tensors

FAMILIES = ("qwen3", "qwen2", "llama")
"""``model_type`` values of ``config.json`` that selection and conversion support."""

DEFAULT_HEAD_DIM: dict[str, int | None] = {"qwen3": 128, "qwen2": None, "llama": None}
"""transformers' default for configs without ``head_dim``; ``None``: D/H."""

DEFAULT_KV_HEADS: dict[str, int | None] = {"qwen3": 32, "qwen2": 32, "llama": None}
"""transformers' default for configs without ``num_key_value_heads``; ``None``: H."""

HUB_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
HUB_WEIGHTS = ("*.safetensors",)
"""Files that are fetched from a Hub model; none of them is code or a pickle."""

HUB_CODE = ("*.py", "*.tiktoken")
"""Files that are also fetched if the user trusts the model's own code: code, and vocabularies that it reads."""

_MOST = 2**20
"""Larger than the layers, heads and channels of any model."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def fingerprint_keys(num_layers: int) -> list[str]:
    """Names of the fingerprint's weights: q, k, v, o of the first and last layer."""
    layers = sorted({0, num_layers - 1})
    return [f"model.layers.{i}.self_attn.{p}.weight" for i in layers for p in PROJECTIONS]


def model_identity_from_hf(
    path_or_model: str | os.PathLike[str] | torch.nn.Module,
    config: Any = None,
    *,
    name: str = "",
    revision: str = "",
) -> ModelIdentity:
    """Identity of a Hugging Face model, from its folder or from a loaded module.

    Args:
        path_or_model: a folder with ``config.json`` and safetensors (one file or a sharded index),
            or a ``PreTrainedModel``. Prefer the folder: a model loaded in a narrower dtype than its
            file has another fingerprint.
        config: its configuration as a dict or a transformers config; read from the folder or taken
            from the model if omitted.
        name: of the identity; default: the folder, or the config's ``_name_or_path``.
        revision: Hub revision, informative.

    Raises:
        HydraError: no such folder or file, an unsupported ``model_type``, or a missing key; names it.
    """
    if isinstance(path_or_model, torch.nn.Module):
        source = "the model"
        body = _config_dict(getattr(path_or_model, "config", None) if config is None else config)
        shape = identity_shape(body, source)
        tensors = _tensors_of_model(path_or_model, fingerprint_keys(shape["num_layers"]))
        name = name or str(body.get("_name_or_path") or "")
    else:
        folder = Path(path_or_model)
        source = str(folder / "config.json")
        body = read_config_json(folder) if config is None else _config_dict(config)
        shape = identity_shape(body, source)
        tensors = read_tensors(folder, fingerprint_keys(shape["num_layers"]))
        name = name or str(path_or_model)
    return ModelIdentity(
        name=name, revision=revision, fingerprint=fingerprint_tensors(tensors), **shape
    )


def identity_shape(config: Mapping[str, Any], source: str = "config.json") -> dict[str, Any]:
    """The shape part of a :class:`ModelIdentity`, from the keys of ``config.json``.

    Raises:
        HydraError: an unsupported ``model_type`` or a missing key.
    """
    family = config.get("model_type")
    if family not in list(FAMILIES):  # compare instead of hash: it may have any type
        raise HydraError(
            f"{source}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        value = config.get(key)
        if not isinstance(value, int) or not 0 < value <= _MOST:
            raise HydraError(
                f"{source}: key {key!r} is missing or no whole number from 1 to {_MOST:,}: {value!r}"
            )
    num_query_heads = config["num_attention_heads"]
    kv_heads = DEFAULT_KV_HEADS[family] or num_query_heads
    head_dim = DEFAULT_HEAD_DIM[family] or config["hidden_size"] // num_query_heads
    return {
        "family": family,
        "num_layers": config["num_hidden_layers"],
        "num_query_heads": num_query_heads,
        "num_kv_heads": config.get("num_key_value_heads") or kv_heads,
        "head_dim": config.get("head_dim") or head_dim,
        "hidden_size": config["hidden_size"],
    }


def read_config_json(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``config.json`` of a Hugging Face folder.

    Raises:
        HydraError: no folder, no file, or not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise HydraError(
            f"{path} does not exist: {folder} is not a Hugging Face model folder; "
            "tools/megatron_to_hf.py makes one from a checkpoint"
        )
    return read_json(path)


def is_hub_name(text: str) -> bool:
    """Whether it has the form ``owner/name`` and is not a path."""
    return not (Path(text).is_absolute() or text.startswith(".") or text.count("/") > 1)


def resolve_hf_folder(
    name_or_path: str | os.PathLike[str],
    revision: str = "",
    *,
    with_code: bool = False,
    with_weights: bool = True,
    fetch: bool = True,
) -> Path:
    """A local folder for a path or a Hub name, which is downloaded into the Hub's cache if necessary.

    Args:
        name_or_path: a folder, or ``owner/name``.
        revision: of a Hub name: branch, tag or commit.
        with_code: whether to fetch the model's own Python, too, which a loader may then run.
        with_weights: whether to fetch the weights.
        fetch: whether to download; otherwise only the Hub's cache is used.

    Raises:
        HydraError: it is neither a folder nor a model in the Hub (or its cache).
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    text = str(name_or_path)
    if not is_hub_name(text):
        raise HydraError(f"{text} is not a folder")
    from huggingface_hub import snapshot_download

    patterns = [
        *HUB_FILES,
        *(HUB_WEIGHTS if with_weights else ()),
        *(HUB_CODE if with_code else ()),
    ]
    try:
        return Path(
            snapshot_download(
                text,
                revision=revision or None,
                allow_patterns=patterns,
                local_files_only=not fetch,
            )
        )
    except Exception as error:  # the Hub client raises many kinds; the user needs one line
        raise HydraError(
            f"{text} is neither a folder nor a model on the Hugging Face Hub: {error}"
        ) from None


def read_tensors(folder: str | os.PathLike[str], keys: list[str]) -> dict[str, torch.Tensor]:
    """Some tensors of a safetensors folder by Hugging Face name; no other weight is read.

    Raises:
        HydraError: no safetensors, a broken index, a missing shard or key; names the file.
    """
    from safetensors import SafetensorError, safe_open

    by_file: dict[Path, list[str]] = {}
    for key, path in _locate(Path(folder), keys).items():
        by_file.setdefault(path, []).append(key)
    tensors = {}
    for path, wanted in by_file.items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                names = set(file.keys())
                for key in wanted:
                    if key not in names:
                        raise HydraError(f"{path}: tensor {key!r} is missing")
                    tensors[key] = file.get_tensor(key)
        except FileNotFoundError:
            raise HydraError(f"{path} does not exist") from None
        except (OSError, SafetensorError) as error:
            raise HydraError(f"{path} cannot be read as safetensors: {error}") from None
    return tensors


def _locate(folder: Path, keys: list[str]) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise HydraError(
                f"{folder} holds neither model.safetensors nor model.safetensors.index.json; "
                "pickled weights (*.bin) are not opened: save the model as safetensors"
            )
        return dict.fromkeys(keys, single)
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        missing = [key for key in keys if key not in weight_map]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HydraError(f"{index} is not a safetensors index: {error!r}") from None
    if missing:
        raise HydraError(f"{index}: tensor {missing[0]!r} is missing")
    return {key: folder / weight_map[key] for key in keys}


def _config_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return {**config.to_dict(), "_name_or_path": getattr(config, "_name_or_path", "")}
    raise HydraError("the model has no Hugging Face config; pass config=")


def _tensors_of_model(model: torch.nn.Module, keys: list[str]) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    missing = [key for key in keys if key not in parameters]
    if missing:
        raise HydraError(f"the model has no parameter {missing[0]!r}")
    return {key: parameters[key] for key in keys}
