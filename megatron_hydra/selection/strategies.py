"""Strategies: each turns a model (or only its shape) into scores, and scores into chosen heads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import ModelIdentity
from megatron_hydra.selection.effects import EffectEngine, Solved, top_heads
from megatron_hydra.selection.patching import PATHS, Head
from megatron_hydra.selection.ranking import (
    Constraints,
    budget,
    choose_heads,
    fuse,
    rank_heads,
    spearman,
    weighted_mean,
    whole_layers,
)

RECEIVER_SHARE = 0.05
"""Heads with less than this share of the strongest receiver's effect are no receivers."""

Heads = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class SelectionOptions:
    """Everything about a selection but the model, the ratio, the strategy, the tasks and the seed.

    Attributes:
        num_prompts: pairs drawn for each task.
        min_prompts: fewer solved ones are an error.
        solved: which prompts count as solved: ``top1``, ``pair`` or ``off``
            (see :meth:`EffectEngine.solve`).
        effects: effects measured exactly by ``interp``: ``direct``, ``total`` or both.
        receiver_effect: the one of them that makes a head a receiver and is its receiver score.
        senders: measure path patching to the receivers.
        sender_weight: weight of a head's sender effect beside its receiver effect (both in units of
            the metric, 0 corrupted … 1 clean).
        num_receivers: at most this many receivers a task; default: the number of FA heads.
        attribution: ``interp`` also measures the first-order estimate, for its rank correlation.
        check_heads: ``attribution`` measures this many random heads exactly, for the same purpose.
        task_weights: task -> weight in the fusion; 1 where not named.
        constraints: on the choice.
        tokens_per_batch: positions computed at a time; 0: 2048 on a CPU, 32768 on a GPU.
    """

    num_prompts: int = 32
    min_prompts: int = 8
    solved: str = "top1"
    effects: tuple[str, ...] = ("direct", "total")
    receiver_effect: str = "direct"
    senders: bool = True
    sender_weight: float = 0.5
    num_receivers: int | None = None
    attribution: bool = True
    check_heads: int = 24
    task_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    constraints: Constraints = dataclasses.field(default_factory=Constraints)
    tokens_per_batch: int = 0

    def __post_init__(self) -> None:
        if self.solved not in ("top1", "pair", "off"):
            raise HydraError(f"--solved {self.solved}: must be top1, pair or off")
        if not self.effects or not set(self.effects) <= {"direct", "total"}:
            raise HydraError("--effects: must be direct, total or both")
        if self.receiver_effect not in self.effects:
            raise HydraError(
                f"--receiver-effect {self.receiver_effect}: that effect is not among --effects "
                f"{' '.join(self.effects)}"
            )
        if self.min_prompts < 1 or self.num_prompts < self.min_prompts:
            raise HydraError(
                f"--min-prompts {self.min_prompts} must be at least 1 and at most --num-prompts "
                f"{self.num_prompts}"
            )
        if self.tokens_per_batch < 0 or self.sender_weight < 0 or self.check_heads < 2:
            raise HydraError(
                "--tokens-per-batch must be at least 0, --sender-weight at least 0, "
                "--check-heads at least 2"
            )
        if self.num_receivers is not None and self.num_receivers < 1:
            raise HydraError(f"--num-receivers {self.num_receivers}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class Context:
    """What a strategy may use.

    Attributes:
        model: identity, with the shape.
        ratio, seed, options: as asked for.
        engine: measures effects; ``None`` for strategies that need no model.
        prompts: task -> its solved prompts.
    """

    model: ModelIdentity
    ratio: str
    seed: int
    options: SelectionOptions
    engine: EffectEngine | None = None
    prompts: Mapping[str, Solved] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H)."""
        return self.model.num_layers, self.model.num_query_heads


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of all heads.

    Attributes:
        by_task: task -> ``[L, H]``.
        unified: the scores that are ranked, ``[L, H]``.
        details: strategy-specific facts, for the head map.
    """

    by_task: dict[str, np.ndarray]
    unified: np.ndarray
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way to select heads.

    Attributes:
        help: one line for the user.
        stages: what it measures of each task (for the progress bar); empty: it needs no model.
        score: from context to scores; ``None``: the choice needs no scores.
        same_in_every_layer: every layer gets an equal share of the FA heads.
        whole_layers: layers are chosen, not heads: those with the best scores, or without scores
            those at equal distances.
    """

    help: str
    stages: Callable[[SelectionOptions], tuple[str, ...]]
    score: Callable[[Context], Scored] | None
    same_in_every_layer: bool = False
    whole_layers: bool = False

    def choose(self, context: Context, scored: Scored | None) -> Heads:
        """The FA heads of every layer."""
        constraints = context.options.constraints
        if self.whole_layers:
            if constraints != Constraints(constraints.granularity):
                raise HydraError(
                    "strategies that choose whole layers take no --min-per-layer, --max-per-layer "
                    "or --kv-group-bonus"
                )
            scores = None if scored is None else scored.unified.mean(1)
            return whole_layers(context.model, context.ratio, scores)
        assert scored is not None
        return choose_heads(
            scored.unified, context.model, context.ratio, constraints, self.same_in_every_layer
        )


# -- scores ----------------------------------------------------------------------------------------


def _interp(context: Context) -> Scored:
    """Receivers by activation patching, senders by path patching, fused over tasks."""
    by_task, details = {}, {}
    for task, prompts in context.prompts.items():
        by_task[task], details[task] = _interp_task(context, task, prompts)
    unified = fuse(by_task, context.options.task_weights)
    return Scored(by_task, unified, {"tasks": details})


def _interp_task(context: Context, task: str, prompts: Solved) -> tuple[np.ndarray, dict[str, Any]]:
    options, engine = context.options, context.engine
    assert engine is not None
    effects = {}
    if "direct" in options.effects:
        effects["direct"] = engine.direct(task, prompts)
    if "total" in options.effects:
        effects["total"] = engine.total(task, prompts)
    details: dict[str, Any] = {"receivers": [], "attribution_spearman": {}}
    if options.attribution:
        effects["attribution"] = engine.attribution(task, prompts)
        details["attribution_spearman"] = {
            kind: _correlation(effects["attribution"], effects[kind]) for kind in options.effects
        }
    score = effects[options.receiver_effect]
    if options.senders:
        count = options.num_receivers or max(1, budget(context.model, context.ratio))
        receivers = top_heads(score, count, RECEIVER_SHARE)
        paths = engine.paths(task, prompts, receivers)
        effects.update({f"sender_{path}": paths[path] for path in PATHS})
        details["receivers"] = [list(head) for head in receivers]
        score = score + options.sender_weight * paths["qkv"]
    details["effects"] = {kind: effect.tolist() for kind, effect in effects.items()}
    return score, details


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation; ``None`` (JSON has no NaN) where one of them is constant."""
    value = spearman(a, b)
    return None if math.isnan(value) else value


def _layer_effects(context: Context) -> Scored:
    """What a layer's attention as a whole does; every head has the score of its layer."""
    assert context.engine is not None
    _, heads = context.shape
    by_task = {
        task: np.repeat(context.engine.layers(task, prompts)[:, None], heads, axis=1)
        for task, prompts in context.prompts.items()
    }
    return Scored(by_task, fuse(by_task, context.options.task_weights))


def _attribution(context: Context) -> Scored:
    """First-order estimates, checked on a few random heads against exact effects."""
    assert context.engine is not None
    layers, heads = context.shape
    count = min(context.options.check_heads, layers * heads)
    picked = np.random.default_rng(context.seed).choice(layers * heads, count, replace=False)
    checked: list[Head] = sorted((int(i) // heads, int(i) % heads) for i in picked)
    by_task, details = {}, {}
    for task, prompts in context.prompts.items():
        estimate = context.engine.attribution(task, prompts)
        exact = context.engine.total(task, prompts, checked)
        rows, columns = np.array(checked).T
        by_task[task] = estimate
        details[task] = {
            "attribution_spearman": {
                "total": _correlation(estimate[rows, columns], exact[rows, columns])
            },
            "checked_heads": len(checked),
        }
    unified = fuse(by_task, context.options.task_weights)
    return Scored(by_task, unified, {"tasks": details})


def _attention_mass(context: Context) -> Scored:
    """Retrieval scores: weighted mean over tasks, unstandardised (one scale, 0 … 1)."""
    assert context.engine is not None
    by_task = {
        task: context.engine.attention_mass(task, prompts)
        for task, prompts in context.prompts.items()
    }
    return Scored(by_task, weighted_mean(by_task, context.options.task_weights))


def _random(context: Context) -> Scored:
    scores = np.random.default_rng(context.seed).random(context.shape)
    return Scored({}, scores)


def _interp_stages(options: SelectionOptions) -> tuple[str, ...]:
    extra = [("attribution", options.attribution), ("paths", options.senders)]
    return ("baseline", *options.effects, *(stage for stage, wanted in extra if wanted))


STRATEGIES: dict[str, Strategy] = {
    "interp": Strategy(
        "causal effects: activation patching finds receivers, path patching senders",
        _interp_stages,
        _interp,
    ),
    "attribution": Strategy(
        "first-order estimate of the total effects: two forwards and one backward for all heads",
        lambda options: ("baseline", "attribution", "total"),
        _attribution,
    ),
    "attention_mass": Strategy(
        "how much a head attends to the answer's earlier occurrences (retrieval score)",
        lambda options: ("baseline", "attention"),
        _attention_mass,
    ),
    "random": Strategy("heads drawn at random from all layers", lambda options: (), _random),
    "uniform": Strategy(
        "random heads, the same number in every layer",
        lambda options: (),
        _random,
        same_in_every_layer=True,
    ),
    "per_layer_quota": Strategy(
        "the best heads by interp's scores, the same number in every layer",
        _interp_stages,
        _interp,
        same_in_every_layer=True,
    ),
    "layerwise": Strategy(
        "whole layers at equal distances (the number of heads is rounded to whole layers)",
        lambda options: (),
        None,
        whole_layers=True,
    ),
    "layerwise_effects": Strategy(
        "the whole layers whose attention matters most (as HALO places its full layers)",
        lambda options: ("baseline", "layers"),
        _layer_effects,
        whole_layers=True,
    ),
}


def ranking_of(scored: Scored | None) -> list[Head]:
    """The global ranking, empty where a strategy has no scores."""
    return [] if scored is None else rank_heads(scored.unified)
