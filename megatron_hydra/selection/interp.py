"""The paper's selection, capability by capability: receivers, rounds of senders, score, positive control."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_hydra.ranks import is_first_rank
from megatron_hydra.selection.effects import EffectEngine, Solved, senders_kind
from megatron_hydra.selection.importance import (
    Importance,
    by_sub_probe,
    intervention_effects,
    passing,
    sub_probes,
)
from megatron_hydra.selection.patching import Head
from megatron_hydra.selection.prompts import PromptPair
from megatron_hydra.selection.ranking import rank_heads

_log = logging.getLogger(__name__)

TIE_WEIGHT = 1e-6
"""Weight of the effects without κ, which order equal scores. It is too small to change any other order."""

CONTROL_SHARE = 0.05
"""Share of all heads that the positive control knocks out; the paper finds 6.5 % critical heads."""

LEAST_FALL = 0.1
"""Without the control's best heads, the readout must decrease by at least this share of the gap."""


@dataclasses.dataclass
class Measured:
    """Measurements of one capability.

    Attributes:
        prompts: its tasks, in order, with their solved pairs, P in total.
        receiver, sender: effects on every pair, ``[L, H, P]``, in [0, 1].
        probe: sub-probe of every pair, ``[P]``.
        receivers: heads that exceed the threshold as receivers.
        rounds: heads that each round of path patching added.
    """

    prompts: dict[str, Solved]
    receiver: np.ndarray
    sender: np.ndarray
    probe: np.ndarray
    receivers: list[Head]
    rounds: list[list[Head]] = dataclasses.field(default_factory=list)

    @property
    def gap(self) -> np.ndarray:
        """m(x) − m(x') of every pair, ``[P]``."""
        return np.concatenate([solved.gap for solved in self.prompts.values()])

    @property
    def importance(self) -> Importance:
        """The scores from all pairs."""
        return Importance.of(self.receiver, self.sender, self.probe)

    def details(self) -> dict[str, Any]:
        """Entry for the head map."""
        found = self.importance
        return {
            "probes": list(self.prompts),
            "sub_probes": len(np.unique(self.probe)),
            "receivers": [list(head) for head in self.receivers],
            "rounds": [
                {"round": number, "added": [list(head) for head in added]}
                for number, added in enumerate(self.rounds, 1)
            ],
            "effects": {
                "receiver": found.receiver.tolist(),
                "sender": found.sender.tolist(),
                "kappa": found.kappa.tolist(),
            },
        }


def measure(
    engine: EffectEngine,
    capabilities: Mapping[str, Sequence[str]],
    prompts: Mapping[str, Solved],
    max_rounds: int,
) -> dict[str, Measured]:
    """Measure receivers and senders of every capability.

    Args:
        capabilities: capability -> its tasks.
        prompts: task -> its solved pairs.
        max_rounds: maximum number of rounds of path patching; a round without new heads is the last.
    """
    found = {
        name: _receivers(engine, {task: prompts[task] for task in tasks})
        for name, tasks in capabilities.items()
    }
    # The receivers of all capabilities first, because they decide the remaining work.
    for one in found.values():
        _plan_rounds(engine, one, max_rounds, 1, one.receivers, [])
    for one in found.values():
        _senders(engine, one, max_rounds)
    return found


def _receivers(engine: EffectEngine, prompts: dict[str, Solved]) -> Measured:
    gap = np.concatenate([solved.gap for solved in prompts.values()])
    falls = [engine.receivers(task, solved) for task, solved in prompts.items()]
    effects = intervention_effects(np.concatenate(falls, axis=-1), gap)
    probe = sub_probes([len(solved.keep) for solved in prompts.values()])
    return Measured(prompts, effects, np.zeros_like(effects), probe, passing(effects, probe))


def _senders(engine: EffectEngine, found: Measured, max_rounds: int) -> None:
    """Rounds of path patching: the heads found in a round are the receivers of the next."""
    newest: list[Head] = found.receivers
    older: list[Head] = []
    for number in range(1, max_rounds + 1):
        if not newest:
            _plan_rounds(engine, found, max_rounds, number, [], [])
            return
        _plan_rounds(engine, found, max_rounds, number, newest, older)
        falls = [
            engine.senders(task, solved, number, newest, older)
            for task, solved in found.prompts.items()
        ]
        effects = intervention_effects(np.concatenate(falls, axis=-1), found.gap)
        # A head that sends in several rounds counts with its largest effect.
        stronger = _mean(effects, found.probe) > _mean(found.sender, found.probe)
        found.sender = np.where(stronger[..., None], effects, found.sender)
        older = older + newest
        newest = [head for head in passing(effects, found.probe) if head not in set(older)]
        found.rounds.append(newest)


def _mean(effects: np.ndarray, probe: np.ndarray) -> np.ndarray:
    return np.asarray(by_sub_probe(effects, probe).mean(0))


def _plan_rounds(
    engine: EffectEngine,
    found: Measured,
    max_rounds: int,
    number: int,
    newest: list[Head],
    older: list[Head],
) -> None:
    """Plan the next round for the estimate of the time left. Without receivers, no further round follows."""
    for task, solved in found.prompts.items():
        if newest and number <= max_rounds:
            engine.plan_senders(task, solved, number, newest, older)
        for later in range(number, max_rounds + 1) if not newest else ():
            engine.bench.time_left.drop(task, senders_kind(later))


# -- the positive control -------------------------------------------------------------------------


def positive_control(engine: EffectEngine, name: str, found: Measured, seed: int) -> dict[str, Any]:
    """Knock out the best heads, and the same number of random other heads. The best must lower the readout.

    A probe that still works without its best heads cannot show which heads matter.

    Returns:
        Entry for the head map: the heads, and for each set the decrease of the readout as share of the gap, and
        the share of answers that are still correct.
    """
    importance = found.importance
    ordered = rank_heads(importance.score + TIE_WEIGHT * importance.without_kappa)
    with_signal = int((importance.score > 0).sum())
    count = max(1, min(math.ceil(CONTROL_SHARE * len(ordered)), with_signal))
    best, others = ordered[:count], ordered[count:]
    picked = np.random.default_rng(seed).choice(len(others), min(count, len(others)), False)
    random = sorted(others[i] for i in picked)
    means = engine.mean_outputs(found.prompts)
    for task, solved in found.prompts.items():
        engine.plan_control(task, solved, 2)
    report: dict[str, Any] = {"heads": [list(head) for head in best], "knocked_out": count}
    for kind, heads in (("best", best), ("random", random)):
        m, right = zip(
            *(engine.knock_out(t, solved, heads, means) for t, solved in found.prompts.items()),
            strict=True,
        )
        clean = np.concatenate([solved.clean for solved in found.prompts.values()])
        lost = float((clean.mean() - np.concatenate(m).mean()) / found.gap.mean())
        report[kind] = {"readout_lost": lost, "accuracy": float(np.concatenate(right).mean())}
    for task in found.prompts:
        engine.bench.time_left.drop(task, "control")
    lost, by_chance = report["best"]["readout_lost"], report["random"]["readout_lost"]
    report["can_fail"] = bool(with_signal and lost >= LEAST_FALL and lost > by_chance)
    if not report["can_fail"] and is_first_rank():
        _log.warning(
            "the probe of %s does not fail: without its %d best heads the readout loses %.2f of its gap, "
            "without as many random heads %.2f; its scores say little about heads",
            name, count, lost, by_chance,
        )  # fmt: skip
    return report


# -- reliability of the scores ------------------------------------------------------------------------


def lengths(
    engine: EffectEngine,
    prompts: Mapping[int, Mapping[str, list[PromptPair]]],
    found: Measured,
    rule: str,
    compare: Callable[[np.ndarray, np.ndarray], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Compare receiver effects on probes of other lengths with the scored effects.

    Args:
        prompts: tokens -> task -> pairs.
        rule: rule for solved pairs (see :meth:`EffectEngine.solve`).
        compare: function of two ``[L, H]`` effects that returns their agreement.
    """
    rows = []
    for tokens, tasks in sorted(prompts.items()):
        solved = {
            task: engine.solve(length_name(task, tokens), pairs, rule)
            for task, pairs in tasks.items()
            if task in found.prompts
        }
        solved = {task: one for task, one in solved.items() if one.keep}
        row: dict[str, Any] = {"tokens": tokens, "pairs": sum(len(s.keep) for s in solved.values())}
        for task in tasks:
            if task not in solved:
                engine.bench.time_left.drop(length_name(task, tokens))
        if solved:
            effects = [
                intervention_effects(engine.receivers(length_name(task, tokens), one), one.gap)
                for task, one in solved.items()
            ]
            probe = sub_probes([len(one.keep) for one in solved.values()])
            row |= compare(found.importance.receiver, _mean(np.concatenate(effects, -1), probe))
        rows.append(row)
    return rows


def length_name(task: str, tokens: int) -> str:
    """Name of a task at another length in the counts of work."""
    return f"{task}@{tokens}"
