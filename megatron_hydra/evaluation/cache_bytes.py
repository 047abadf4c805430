"""Measure the bytes of a model's cache on real tensors, for any Hugging Face causal model."""

from __future__ import annotations

from typing import Any

import torch

from megatron_hydra.errors import HydraError

_WINDOWS = ("sliding_window", "attention_chunk_size")
"""Keys of transformers' configs that limit the distance of attention."""


def measure_cache_bytes(model: Any, length: int = 512) -> dict[str, float]:
    """Measure the cache of one sequence: bytes per token, and bytes of constant size.

    It runs prompts of ``length`` and ``length // 2`` tokens, and adds the storage of all tensors in the
    returned caches. The difference is the growing part. If the model has a window, both prompts are longer by
    this window, because a window that is not full grows as well. The function reads only the window from the
    config.

    Args:
        model: must return a cache, by one of its names in transformers, when called with ``use_cache``.
        length: length of the longer prompt in tokens, without the window; at least 2.

    Returns:
        ``kv_bytes_per_token`` and ``state_bytes`` (recurrent states, full windows, convolution tails,
        counters).

    Raises:
        HydraError: the model returns no cache, or ``length`` is below 2.
    """
    if length < 2:
        raise HydraError(
            f"a cache is measured at two lengths: {length} tokens are too few, give at least 2"
        )
    window = _window(model)
    short, long = window + length // 2, window + length
    small, large = (_cache_bytes(model, tokens, step=window > 0) for tokens in (short, long))
    per_token = (large - small) / (long - short)
    return {
        "kv_bytes_per_token": per_token,
        "state_bytes": small - per_token * (short + (window > 0)),
    }


def _window(model: Any) -> int:
    """Length of the longest window or chunk of a layer's attention, in tokens; 0: no limit."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    hydra = getattr(config, "hydra", None) or {}
    own = hydra["window"] if hydra.get("mixer") == "token" else 0
    return max(own, *(int(getattr(config, name, None) or 0) for name in _WINDOWS))


def _cache_bytes(model: Any, length: int, step: bool) -> int:
    """Bytes of the cache after a prompt, and after one more token if ``step``.

    The step is needed for windows: at first a full window is a view of the prompt's keys and values, which
    keeps all of them in memory until the next token.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(length + 1, device=model.device) * 7 % vocabulary)[None]
    with torch.inference_mode():
        out = model(input_ids=ids[:, :length], use_cache=True)
        cache = returned_cache(out)
        if cache and step:
            model(input_ids=ids[:, length:], use_cache=True, **cache)
    if not cache:
        raise HydraError(f"{type(model).__name__} returns no cache, so it cannot be measured")
    storages: dict[int, int] = {}
    _collect(cache, storages, set())
    return sum(storages.values())


def returned_cache(out: Any) -> dict[str, Any]:
    """The cache that a model returned, as the keyword argument for its next call; empty if none.

    Its name in transformers is ``cache`` from 5.24 on, before that ``past_key_values`` or ``cache_params``.
    """
    for name in ("cache", "past_key_values", "cache_params"):
        if (cache := getattr(out, name, None)) is not None:
            return {name: cache}
    return {}


def _collect(thing: Any, storages: dict[int, int], seen: set[int]) -> None:
    """Record the storage of every tensor reachable from ``thing``, each once."""
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return
    if id(thing) in seen or isinstance(thing, str | bytes | int | float | type | torch.nn.Module):
        return
    seen.add(id(thing))
    if isinstance(thing, dict):
        children = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        children = list(thing)
    else:
        children = list(getattr(thing, "__dict__", {}).values())
    for child in children:
        _collect(child, storages, seen)
