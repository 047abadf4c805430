"""How much a model's cache holds: measured on real tensors, for any Hugging Face causal model."""

from __future__ import annotations

from typing import Any

import torch

from megatron_hydra.errors import HydraError


def measure_cache_bytes(model: Any, length: int = 512) -> dict[str, float]:
    """Bytes that one sequence's cache grows by per token, and what does not grow.

    Runs prompts of ``length`` and ``length // 2`` tokens and adds up the storage of every tensor
    that the returned caches hold: the difference is what grows. The config is not consulted.

    Args:
        model: returns ``past_key_values`` (or ``cache_params``) when called with ``use_cache``.
        length: tokens of the longer prompt, at least 2.

    Returns:
        ``kv_bytes_per_token`` and ``state_bytes`` (recurrent states, convolution tails, counters).

    Raises:
        HydraError: the model returns no cache, or ``length`` is below 2.
    """
    if length < 2:
        raise HydraError(f"a cache is measured at two lengths: {length} tokens are too few")
    half = length // 2
    small, large = _cache_bytes(model, half), _cache_bytes(model, length)
    per_token = (large - small) / (length - half)
    return {"kv_bytes_per_token": per_token, "state_bytes": small - per_token * half}


def _cache_bytes(model: Any, length: int) -> int:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(length, device=model.device) * 7 % vocabulary)[None]
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True)
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        cache = getattr(out, "cache_params", None)
    if cache is None:
        raise HydraError(f"{type(model).__name__} returns no cache: nothing to measure")
    storages: dict[int, int] = {}
    _collect(cache, storages, set())
    return sum(storages.values())


def _collect(thing: Any, storages: dict[int, int], seen: set[int]) -> None:
    """Note the storage of every tensor reachable from ``thing``, each one once."""
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
