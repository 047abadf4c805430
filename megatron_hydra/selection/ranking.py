"""Compute one global ranking from effects, and choose heads by the ranking. Plain NumPy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_hydra import head_map
from megatron_hydra.config.selection import Constraints
from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import ModelIdentity, num_full_attention_heads

SPREAD_FLOOR = 1e-3
"""Smallest standard deviation in a division. If no head changes the metric by a thousandth, the noise of this
capability must not be scaled to the size of the signal of the others."""


def standardise(scores: np.ndarray) -> np.ndarray:
    """Scale to mean 0 and standard deviation 1 over all heads, ``[L, H]`` (see :data:`SPREAD_FLOOR`)."""
    return (scores - scores.mean()) / max(float(scores.std()), SPREAD_FLOOR)


def weighted_mean(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Weighted mean over capabilities, ``[L, H]``.

    Args:
        scores: capability -> ``[L, H]``.
        weights: capability -> weight; default 1.

    Raises:
        HydraError: a weight names an unknown capability, or no weight is positive.
    """
    unknown = sorted(set(weights) - set(scores))
    if unknown:
        raise HydraError(
            f"--task-weight {unknown[0]}: no such task; the tasks are {', '.join(scores)}"
        )
    values = [float(weights.get(name, 1.0)) for name in scores]
    if min(values) < 0 or sum(values) <= 0:
        raise HydraError("--task-weight: weights must not be negative, and one must be positive")
    total = sum(w * s for w, s in zip(values, scores.values(), strict=True))
    return np.asarray(total / sum(values))


def fuse(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """:func:`weighted_mean` of standardised scores, ``[L, H]``."""
    return weighted_mean({name: standardise(s) for name, s in scores.items()}, weights)


def rank_heads(scores: np.ndarray) -> list[tuple[int, int]]:
    """All heads (layer, head), best first; ties go to the earlier layer and head."""
    order = np.argsort(-scores.reshape(-1), kind="stable")
    heads = scores.shape[1]
    return [(int(i) // heads, int(i) % heads) for i in order]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two score arrays (ties share their mean rank); NaN if one is constant."""
    x, y = _ranks(a.reshape(-1)), _ranks(b.reshape(-1))
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum() / norm) if norm else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def budget(model: ModelIdentity, ratio: str, granularity: str = "query_head") -> int:
    """Number of FA heads; for whole KV groups the nearest multiple, at least one group."""
    count = num_full_attention_heads(model.num_layers, model.num_query_heads, ratio)
    group = model.num_query_heads // model.num_kv_heads
    if granularity == "query_head" or count == 0:
        return count
    return max(1, (2 * count + group) // (2 * group)) * group


def choose_heads(
    scores: np.ndarray,
    model: ModelIdentity,
    ratio: str,
    constraints: Constraints,
    same_in_every_layer: bool = False,
) -> tuple[tuple[int, ...], ...]:
    """Choose the best heads within the budget and the constraints.

    The choice is greedy: first every layer's minimum, then always the best remaining head in a layer that is
    not full. The score of a head includes the bonus if its KV group has a chosen head.

    Args:
        scores: ``[L, H]``, higher is better.
        same_in_every_layer: every layer gets the same share of the budget (the numbers differ by at most one
            if the budget is not a multiple of the layers).

    Returns:
        For each layer the sorted chosen heads.

    Raises:
        HydraError: the constraints contradict the budget; names both numbers.
    """
    if scores.shape != (model.num_layers, model.num_query_heads):
        raise ValueError(f"scores have shape {scores.shape}, which does not fit the model")
    group_size = model.num_query_heads // model.num_kv_heads
    size = group_size if constraints.granularity == "kv_group" else 1
    units = scores.reshape(model.num_layers, -1, size).mean(-1)
    count = budget(model, ratio, constraints.granularity) // size
    lowest, highest = _limits(units.shape, count, size, constraints)
    if same_in_every_layer:
        # If the budget keeps the limits (checked above), equal shares keep them as well.
        lowest = highest = np.array(spread_evenly(count, model.num_layers))
    group = np.arange(units.shape[1]) // (group_size // size)
    bonus = constraints.kv_group_bonus * float(scores.std())
    chosen = _greedy(units, count, lowest, highest, group, bonus)
    return tuple(
        tuple(int(u) * size + i for u in np.flatnonzero(layer) for i in range(size))
        for layer in chosen
    )


def _limits(
    shape: tuple[int, ...], count: int, size: int, constraints: Constraints
) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum number of units in each layer, ``[L]``; a unit is ``size`` heads."""
    layers, per_layer = shape
    lowest = -(-constraints.min_per_layer // size)
    limit = constraints.max_per_layer
    highest = per_layer if limit is None else min(per_layer, limit // size)
    if lowest > highest:
        raise HydraError(
            f"--min-per-layer {constraints.min_per_layer} does not fit into a layer of "
            f"{per_layer * size} heads (of which at most {highest * size} may be FA)"
        )
    if count and lowest * layers > count:
        raise HydraError(
            f"--min-per-layer {constraints.min_per_layer} needs {lowest * size * layers} FA "
            f"heads in {layers} layers, the ratio gives {count * size}; lower one of them"
        )
    if highest * layers < count:
        raise HydraError(
            f"--max-per-layer {limit} allows {highest * size * layers} FA heads in {layers} "
            f"layers, the ratio asks for {count * size}; raise one of them"
        )
    return np.full(layers, lowest if count else 0), np.full(layers, highest)


def _greedy(
    units: np.ndarray,
    count: int,
    lowest: np.ndarray,
    highest: np.ndarray,
    group: np.ndarray,
    bonus: float,
) -> np.ndarray:
    chosen = np.zeros(units.shape, dtype=bool)
    for layer, least in enumerate(lowest):
        chosen[layer, np.argsort(-units[layer], kind="stable")[:least]] = True
    while chosen.sum() < count:
        open_group = np.stack([np.isin(group, group[row]) for row in chosen])
        value = units + bonus * open_group
        value[chosen] = -np.inf
        value[chosen.sum(1) >= highest] = -np.inf
        chosen.reshape(-1)[int(value.argmax())] = True
    return chosen


def whole_layers(
    model: ModelIdentity, ratio: str, scores: np.ndarray | None = None
) -> tuple[tuple[int, ...], ...]:
    """:func:`megatron_hydra.head_map.whole_layers` at a ratio.

    Args:
        scores: ``[L]``, or ``None``.
    """
    count = num_full_attention_heads(model.num_layers, model.num_query_heads, ratio)
    listed = None if scores is None else scores.tolist()
    return head_map.whole_layers(model.num_layers, model.num_query_heads, count, listed)


def spread_evenly(count: int, bins: int) -> list[int]:
    """Distribute ``count`` items over ``bins``: numbers differ by at most one, larger ones spread evenly."""
    return [(i + 1) * count // bins - i * count // bins for i in range(bins)]
