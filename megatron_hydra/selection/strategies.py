"""Strategies: each computes scores from a model (or only from its shape), and chooses heads by the scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_hydra.config.selection import Constraints, SelectionOptions
from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import ModelIdentity
from megatron_hydra.options import flags
from megatron_hydra.selection import interp
from megatron_hydra.selection.effects import EffectEngine, Solved, senders_kind, top_heads
from megatron_hydra.selection.importance import min_max
from megatron_hydra.selection.patching import PATHS, Head
from megatron_hydra.selection.prompts import PromptPair
from megatron_hydra.selection.ranking import (
    budget,
    choose_heads,
    fuse,
    rank_heads,
    spearman,
    weighted_mean,
    whole_layers,
)
from megatron_hydra.selection.trust import agreement, trust_report

RECEIVER_SHARE = 0.05
"""Heads with less than this share of the strongest receiver's effect are not receivers."""

Heads = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Context:
    """The inputs of a strategy.

    Attributes:
        model: identity of the model, with its shape.
        ratio, seed, options: as given by the user.
        engine: measures effects; ``None`` for strategies that need no model.
        prompts: task -> its solved prompts.
        capabilities: capability -> its solved tasks.
        lengths: tokens -> task -> prompts of other lengths.
        text: token sequences, int64 ``[1, S]``, for strategies that read text.
        compared: name -> the ranking of another map.
    """

    model: ModelIdentity
    ratio: str
    seed: int
    options: SelectionOptions
    engine: EffectEngine | None = None
    prompts: Mapping[str, Solved] = dataclasses.field(default_factory=dict)
    capabilities: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    lengths: Mapping[int, Mapping[str, list[PromptPair]]] = dataclasses.field(default_factory=dict)
    text: Sequence[torch.Tensor] = ()
    compared: Mapping[str, Sequence[Head]] = dataclasses.field(default_factory=dict)

    @property
    def task_weights(self) -> dict[str, float]:
        """Weights of single tasks: the tasks of a capability share its weight."""
        weights = self.options.task_weights
        return {
            task: weights.get(name, 1.0) / len(tasks)
            for name, tasks in self.capabilities.items()
            for task in tasks
        }

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H)."""
        return self.model.num_layers, self.model.num_query_heads


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of all heads.

    Attributes:
        by_task: capability or task -> ``[L, H]``.
        unified: the scores to rank, ``[L, H]``.
        details: strategy-specific facts, for the head map.
        signal: ``[L, H]`` bool, true for heads with any effect, if the strategy gives it.
    """

    by_task: dict[str, np.ndarray]
    unified: np.ndarray
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    signal: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way to select heads.

    Attributes:
        help: one line for the user.
        stages: measurements of each task (for the progress bar); empty: it needs no model.
        score: function from context to scores; ``None``: the choice needs no scores.
        same_in_every_layer: every layer gets an equal share of the FA heads.
        in_every_layer: every layer gets at least one FA head.
        whole_layers: choose whole layers: those with the best scores, or without scores layers at equal
            distances.
        total_heads: heads whose total effect is measured, if any; ``None``: all.
        takes: options that only this strategy and similar ones use.
        learns: whether it trains: it reads text in addition to prompts, and runs in one process.
    """

    help: str
    stages: Callable[[SelectionOptions], tuple[str, ...]]
    score: Callable[[Context], Scored] | None
    same_in_every_layer: bool = False
    in_every_layer: bool = False
    whole_layers: bool = False
    total_heads: Callable[[Context], list[Head]] | None = None
    takes: tuple[str, ...] = ()
    learns: bool = False

    def refuse_options(self, name: str, options: SelectionOptions) -> None:
        """Check that no option is set that this strategy ignores.

        Raises:
            HydraError: an ignored option is set; names the strategies that use it.
        """
        if not self.stages(options):
            return
        for other in STRATEGIES.values():
            foreign = [option for option in other.takes if option not in self.takes]
            for option in options.changed(foreign):
                whose = [n for n, s in STRATEGIES.items() if option in s.takes]
                raise HydraError(
                    f"{flags(SelectionOptions)[option]} has no effect with --strategy {name}; it belongs to "
                    f"{', '.join(whose)}"
                )

    def choose(self, context: Context, scored: Scored | None) -> Heads:
        """The FA heads of every layer.

        Raises:
            HydraError: the ratio and the constraints contradict each other.
        """
        constraints = context.options.constraints
        if self.whole_layers:
            if constraints != Constraints(constraints.granularity):
                raise HydraError(
                    "strategies that choose whole layers do not support --min-per-layer, --max-per-layer "
                    "and --kv-group-bonus"
                )
            scores = None if scored is None else scored.unified.mean(1)
            return whole_layers(context.model, context.ratio, scores)
        assert scored is not None
        if self.in_every_layer:
            self._check_one_head_per_layer(context)
            least = max(1, constraints.min_per_layer)
            constraints = dataclasses.replace(constraints, min_per_layer=least)
        return choose_heads(
            scored.unified, context.model, context.ratio, constraints, self.same_in_every_layer
        )

    def _check_one_head_per_layer(self, context: Context) -> None:
        granularity = context.options.constraints.granularity
        model = context.model
        unit = 1 if granularity == "query_head" else model.num_query_heads // model.num_kv_heads
        count = budget(model, context.ratio, granularity)
        if 0 < count < unit * model.num_layers:
            raise HydraError(
                f"--strategy global_interp_c needs {unit * model.num_layers} FA heads, {unit} in "
                f"each of {model.num_layers} layers; --ratio {context.ratio} gives {count}: use a "
                "lower ratio, or --strategy global_interp"
            )


# -- scores ----------------------------------------------------------------------------------------


def _interp(context: Context) -> Scored:
    """The paper's scores (equations 9 to 12), and the report on their reliability."""
    options, engine = context.options, context.engine
    assert engine is not None
    found = interp.measure(engine, context.capabilities, context.prompts, options.max_rounds)
    by_capability = {name: one.importance.score for name, one in found.items()}
    weights = options.task_weights
    fused = weighted_mean({n: min_max(s) for n, s in by_capability.items()}, weights)
    order = {n: min_max(one.importance.without_kappa) for n, one in found.items()}
    unified = fused + interp.TIE_WEIGHT * weighted_mean(order, weights)
    count = budget(context.model, context.ratio, options.constraints.granularity)
    trust = trust_report(found, fused, count, context.seed)
    details = {"capabilities": {name: one.details() for name, one in found.items()}}
    for name, one in found.items():
        if options.control:
            details["capabilities"][name]["control"] = interp.positive_control(
                engine, name, one, context.seed
            )
        wanted = {
            tokens: here
            for tokens, tasks in context.lengths.items()
            if (here := {task: pairs for task, pairs in tasks.items() if task in one.prompts})
        }
        if wanted:
            trust["capabilities"][name]["lengths"] = interp.lengths(
                engine, wanted, one, options.solved, lambda a, b: agreement(a, b, count)
            )
    return Scored(by_capability, unified, details | {"trust": trust}, fused > 0)


def _interp_denoise(context: Context) -> Scored:
    """Our former scoring: denoising with frozen MLPs; receivers and their senders, by task."""
    options, engine = context.options, context.engine
    assert engine is not None
    effects: dict[str, dict[str, np.ndarray]] = {task: {} for task in context.prompts}
    receivers: dict[str, list[Head]] = {}
    # The receivers of all tasks first, because they decide the remaining work.
    for task, prompts in context.prompts.items():
        effect = _EFFECTS[options.receiver_effect](engine, task, prompts)
        effects[task][options.receiver_effect] = effect
        if options.senders:
            count = options.num_receivers or max(1, budget(context.model, context.ratio))
            receivers[task] = top_heads(effect, count, RECEIVER_SHARE)
            engine.plan_paths(task, prompts, receivers[task])
    by_task, details = {}, {}
    for task, prompts in context.prompts.items():
        measured = effects[task]
        for kind in options.exact_effects:
            if kind not in measured:
                measured[kind] = _EFFECTS[kind](engine, task, prompts)
        by_task[task], details[task] = _denoise_task(
            context, task, prompts, measured, receivers.get(task, [])
        )
    unified = fuse(by_task, context.task_weights)
    return Scored(by_task, unified, {"tasks": details})


_EFFECTS: dict[str, Callable[[EffectEngine, str, Solved], np.ndarray]] = {
    "direct": EffectEngine.direct,
    "total": EffectEngine.total,
}


def _denoise_task(
    context: Context,
    task: str,
    prompts: Solved,
    effects: dict[str, np.ndarray],
    receivers: list[Head],
) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores of a task, and its entry in the map.

    Args:
        effects: kind -> measured effects, ``[L, H]``.
    """
    options, engine = context.options, context.engine
    assert engine is not None
    effects = {kind: effects[kind] for kind in options.exact_effects}
    details: dict[str, Any] = {"receivers": [], "attribution_spearman": {}}
    if options.attribution:
        effects["attribution"] = engine.attribution(task, prompts)
        details["attribution_spearman"] = {
            kind: _correlation(effects["attribution"], effects[kind])
            for kind in options.exact_effects
        }
    score = effects[options.receiver_effect]
    if options.senders:
        paths = engine.paths(task, prompts, receivers)
        effects.update({f"sender_{path}": paths[path] for path in PATHS})
        details["receivers"] = [list(head) for head in receivers]
        score = score + options.sender_weight * paths["qkv"]
    details["effects"] = {kind: effect.tolist() for kind, effect in effects.items()}
    return score, details


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation; ``None`` if an array is constant (JSON has no NaN)."""
    value = spearman(a, b)
    return None if math.isnan(value) else value


def _layer_effects(context: Context) -> Scored:
    """Effect of a layer's whole attention; every head has the score of its layer."""
    assert context.engine is not None
    _, heads = context.shape
    by_task = {
        task: np.repeat(context.engine.layers(task, prompts)[:, None], heads, axis=1)
        for task, prompts in context.prompts.items()
    }
    return Scored(by_task, fuse(by_task, context.task_weights))


def _checked_heads(context: Context) -> list[Head]:
    """Random heads whose estimate is compared with the exact effect."""
    layers, heads = context.shape
    count = min(context.options.check_heads, layers * heads)
    picked = np.random.default_rng(context.seed).choice(layers * heads, count, replace=False)
    return sorted((int(i) // heads, int(i) % heads) for i in picked)


def _attribution(context: Context) -> Scored:
    """First-order estimates, checked on a few random heads against exact effects."""
    assert context.engine is not None
    checked = _checked_heads(context)
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
    unified = fuse(by_task, context.task_weights)
    return Scored(by_task, unified, {"tasks": details})


def _attention_mass(context: Context) -> Scored:
    """Retrieval scores: weighted mean over tasks, not standardised (all have the scale 0 … 1)."""
    assert context.engine is not None
    by_task = {
        task: context.engine.attention_mass(task, prompts)
        for task, prompts in context.prompts.items()
    }
    return Scored(by_task, weighted_mean(by_task, context.task_weights))


def _learned_gates(context: Context) -> Scored:
    """Score of each head: the time that its gate stays open while the budget decreases."""
    from megatron_hydra.selection import learned_gates

    assert context.engine is not None
    options = context.options
    found = learned_gates.learn(
        context.engine,
        context.capabilities,
        context.prompts,
        context.text,
        learned_gates.GateOptions(
            options.align_tokens,
            options.gate_tokens,
            options.gate_steps,
            options.head_cost,
            context.seed,
        ),
        options.task_weights,
        context.compared,
    )
    return Scored({}, found.openness, found.details)


def _random(context: Context) -> Scored:
    scores = np.random.default_rng(context.seed).random(context.shape)
    return Scored({}, scores)


def _fixed(context: Context) -> Scored:
    """The same order of heads in every layer: by index."""
    layers, heads = context.shape
    return Scored({}, np.tile(-np.arange(heads, dtype=float), (layers, 1)))


def _interp_stages(options: SelectionOptions) -> tuple[str, ...]:
    rounds = [senders_kind(number) for number in range(1, options.max_rounds + 1)]
    control = ["means", "control"] if options.control else []
    return ("baseline", "receivers", *rounds, *control)


def _denoise_stages(options: SelectionOptions) -> tuple[str, ...]:
    extra = [("attribution", options.attribution), ("paths", options.senders)]
    return ("baseline", *options.exact_effects, *(stage for stage, wanted in extra if wanted))


def _no_stages(_: SelectionOptions) -> tuple[str, ...]:
    return ()


_OF_INTERP = ("max_rounds", "control", "stability")
_OF_DENOISE = ("effects", "receiver_effect", "senders", "sender_weight", "num_receivers")
_OF_GATES = ("text", "align_tokens", "gate_tokens", "gate_steps", "head_cost", "compare")
STRATEGIES: dict[str, Strategy] = {
    "global_interp_c": Strategy(
        "the best heads of all layers by the paper's causal effects (receivers by activation patching, "
        "senders by path patching), at least one in every layer",
        _interp_stages,
        _interp,
        in_every_layer=True,
        takes=_OF_INTERP,
    ),
    "global_interp": Strategy(
        "the best heads of all layers by these effects, wherever they are",
        _interp_stages,
        _interp,
        takes=_OF_INTERP,
    ),
    "layer_interp": Strategy(
        "the best heads by these effects, the same number in every layer",
        _interp_stages,
        _interp,
        same_in_every_layer=True,
        takes=_OF_INTERP,
    ),
    "interp_denoise": Strategy(
        "the best heads of all layers by our former effects: clean into corrupted, MLPs frozen",
        _denoise_stages,
        _interp_denoise,
        takes=_OF_DENOISE,
    ),
    "global_random": Strategy("heads drawn at random from all layers", _no_stages, _random),
    "layer_random": Strategy(
        "random heads, the same number in every layer",
        _no_stages,
        _random,
        same_in_every_layer=True,
    ),
    "fixed": Strategy(
        "the first heads of every layer, the same number in each",
        _no_stages,
        _fixed,
        same_in_every_layer=True,
    ),
    "attribution": Strategy(
        "first-order estimate of the total effects: two forwards and one backward for all heads",
        lambda options: ("baseline", "attribution", "total"),
        _attribution,
        total_heads=_checked_heads,
    ),
    "attention_mass": Strategy(
        "how much a head attends to the answer's earlier occurrences (retrieval score)",
        lambda options: ("baseline", "attention"),
        _attention_mass,
    ),
    "learned_gates": Strategy(
        "heads chosen jointly: one gate a head between the teacher's attention and an aligned GDN branch, "
        "learned while the budget shrinks; sees redundancy, and measures what every budget recovers",
        lambda options: ("baseline",),
        _learned_gates,
        takes=_OF_GATES,
        learns=True,
    ),
    "layerwise": Strategy(
        "whole layers at equal distances (the number of heads is rounded to whole layers)",
        _no_stages,
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
"""Name -> strategy. The paper's strategies: ``global_interp_c``, ``global_interp``, ``layer_interp``,
``global_random``, ``layer_random``, ``fixed``."""


def ranking_of(scored: Scored | None) -> list[Head]:
    """The global ranking; empty if a strategy has no scores."""
    return [] if scored is None else rank_heads(scored.unified)
