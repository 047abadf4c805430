"""The tasks of a selection: those that were asked for, those that the model solves, what each will take."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_hydra.errors import HydraError
from megatron_hydra.selection.capabilities import DEFAULT_TASKS, Capability, make_capability
from megatron_hydra.selection.effects import EffectEngine, Solved
from megatron_hydra.selection.prompts import PromptPair
from megatron_hydra.selection.strategies import SelectionOptions
from megatron_hydra.selection.time_left import in_words
from megatron_hydra.selection.work import is_first_rank

_log = logging.getLogger(__name__)

FEW = 8
"""Prompts of every task in the solve check, at least …"""
FEW_IN_ALL = 24
"""… and so many of all tasks together: where none of them is solved, no task will have enough."""

LONG = 600.0
"""Seconds from which on the options that make a selection shorter are named."""

LeftOut = dict[str, dict[str, Any]]
"""Task -> ``drawn`` and ``solved`` prompts, and the ``reason`` in words."""


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The prompts of every task.

    Attributes:
        pairs: task -> its pairs.
        named: tasks that the user asked for; the others may be left out.
        left_out: default tasks that this tokenizer gives no prompts for.
    """

    pairs: dict[str, list[PromptPair]]
    named: frozenset[str]
    left_out: LeftOut = dataclasses.field(default_factory=dict)

    @classmethod
    def draw(
        cls,
        tasks: Sequence[str | Capability] | None,
        tokenizer: Any | None,
        vocab_size: int,
        seed: int,
        options: SelectionOptions,
    ) -> Tasks:
        """Prompts of the tasks that were named, or else of the default ones that there are any of.

        A task with a weight has been named as well.

        Raises:
            HydraError: a task that is not known or given twice, or a named one without prompts.
        """
        wanted = DEFAULT_TASKS if tasks is None else tasks
        capabilities = [make_capability(t) if isinstance(t, str) else t for t in wanted]
        names = [c.name for c in capabilities]
        if not names:
            raise HydraError("--tasks: at least one task is needed")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise HydraError(f"--tasks: {twice[0]} is given twice")
        named = frozenset(names if tasks is not None else options.task_weights)
        pairs: dict[str, list[PromptPair]] = {}
        left_out: LeftOut = {}
        for capability in capabilities:
            name = capability.name
            try:
                pairs[name] = capability.prompts(tokenizer, vocab_size, options.num_prompts, seed)
            except HydraError as error:
                if name in named:
                    raise
                reason = str(error).removeprefix(f"--tasks {name}: ")
                left_out[name] = {"drawn": 0, "solved": 0, "reason": reason}
        for name, facts in left_out.items():
            _warn(name, facts)
        if not pairs:
            raise HydraError(
                f"none of the default tasks has prompts for this model ({'; '.join(left_out)}); give "
                "prompts of your own: --tasks jsonl:PATH"
            )
        return cls(pairs, named, left_out)


def solved_tasks(
    engine: EffectEngine,
    tasks: Tasks,
    options: SelectionOptions,
    kinds: Sequence[str],
    receivers: int,
    total_heads: int,
) -> tuple[dict[str, Solved], LeftOut]:
    """Which tasks the model solves: a few prompts of every task first, then all prompts.

    Args:
        kinds: what will be measured of a task (see :meth:`EffectEngine.expect`, as for ``receivers`` and
            ``total_heads``).

    Returns:
        The tasks that count, in their order, and those that were left out.

    Raises:
        HydraError: a named task has fewer than ``options.min_prompts`` solved prompts, or every task has.
    """
    checked = _check(engine, tasks, options)
    if not any(solved for solved, _ in checked.values()):
        raise HydraError(_none_solved(checked))
    shares = {task: solved / count for task, (solved, count) in checked.items()}
    if engine.bench.shows:
        for task, share in shares.items():
            rest = [kind for kind in kinds if kind != "baseline"]
            engine.expect(task, tasks.pairs[task], rest, share, receivers, total_heads)
        largest = max(shares, key=lambda task: shares[task] * _size(tasks.pairs[task]))
        engine.time_samples(tasks.pairs[largest], kinds)
        engine.bench.say(_table(engine, checked, tasks.named))
        engine.bench.say(_duration(engine, options, kinds))
    found: dict[str, Solved] = {}
    left_out = dict(tasks.left_out)
    # The one least likely to be solved first: if that is an error, it comes early.
    for task in sorted(shares, key=lambda task: shares[task]):
        prompts = engine.solve(task, tasks.pairs[task], options.solved)
        reason = _why_not(prompts, options.min_prompts, "attention" in kinds)
        if not reason:
            found[task] = prompts
            continue
        drawn, solved = len(prompts.pairs), len(prompts.keep)
        if task in tasks.named:
            raise HydraError(
                f"--tasks {task}: {reason}; leave the task out, make it easier, give more prompts "
                "(--num-prompts), or lower --min-prompts"
            )
        left_out[task] = {"drawn": drawn, "solved": solved, "reason": reason}
        _warn(task, left_out[task])
        engine.bench.time_left.drop(task)
    if not found:
        listed = "; ".join(f"{task}: {facts['reason']}" for task, facts in left_out.items())
        raise HydraError(
            f"no default task is solved often enough: {listed}. Lower --min-prompts, give more prompts "
            "(--num-prompts), or prompts of your own (--tasks jsonl:PATH)"
        )
    return {task: found[task] for task in tasks.pairs if task in found}, left_out


def _why_not(prompts: Solved, minimum: int, looks_for_answer: bool) -> str:
    """Why a task cannot be used; empty if it can."""
    solved, drawn = len(prompts.keep), len(prompts.pairs)
    if solved < minimum:
        return f"the model solves {solved} of {drawn} prompts, at least {minimum} are needed"
    if looks_for_answer and not any(
        prompts.pairs[i].answer in prompts.pairs[i].clean for i in prompts.keep
    ):
        return "no answer occurs in its prompt, so attention_mass has nothing to look at"
    return ""


def _warn(task: str, facts: dict[str, Any]) -> None:
    if is_first_rank():
        _log.warning("task %s is left out: %s", task, facts["reason"])


def _check(
    engine: EffectEngine, tasks: Tasks, options: SelectionOptions
) -> dict[str, tuple[int, int]]:
    """Task -> (solved, run) of a few prompts."""
    few = max(FEW, -(-FEW_IN_ALL // len(tasks.pairs)))
    return {
        task: engine.check(task, pairs, options.solved, few) for task, pairs in tasks.pairs.items()
    }


def _none_solved(checked: dict[str, tuple[int, int]]) -> str:
    listed = ", ".join(f"{task} {solved} of {run}" for task, (solved, run) in checked.items())
    return (
        f"the model solves no prompt of any task (solve check: {listed}), so there is nothing to find "
        "out about its heads; give easier prompts (needle_single:tokens=64, jsonl:PATH), or count "
        "prompts by a weaker rule (--solved pair)"
    )


def _table(engine: EffectEngine, checked: dict[str, tuple[int, int]], named: frozenset[str]) -> str:
    """The solve check as people read it, with the time that each task will take."""
    width = max(len("task"), *map(len, checked))
    lines = [f"{'solve check':<{width}}  solved    will take"]
    for task, (solved, run) in checked.items():
        seconds = engine.bench.time_left.seconds(task=task) or 0.0
        takes = f"about {in_words(seconds)}" if solved else "nothing if it is left out"
        if not solved and task in named:
            takes = "an error if it stays so"
        lines.append(f"{task:<{width}}  {f'{solved} of {run}':<8}  {takes}")
    return "\n".join(lines)


def _duration(engine: EffectEngine, options: SelectionOptions, kinds: Sequence[str]) -> str:
    """What all will take, and which options make it shorter."""
    left = engine.bench.time_left
    whole = left.seconds() or 0.0
    text = f"in all about {in_words(whole)}"
    if whole < LONG:
        return text
    shorter: list[tuple[str, float]] = []
    if "total" in options.effects and options.receiver_effect == "direct" and "total" in kinds:
        shorter.append(("--effects direct", whole - (left.seconds(kinds=("total",)) or 0.0)))
    fewer = max(options.min_prompts, options.num_prompts // 4)
    if fewer < options.num_prompts:
        shorter.append((f"--num-prompts {fewer}", whole * fewer / options.num_prompts))
    if "attribution" in kinds and options.attribution:
        estimate = left.seconds(kinds=("attribution",)) or 0.0
        shorter.append(("--no-attribution", whole - estimate))
    listed = "; ".join(f"{option} makes it about {in_words(s)}" for option, s in shorter)
    return f"{text}; {listed}; --tasks with fewer tasks, as above" if listed else text


def _size(pairs: list[PromptPair]) -> int:
    """Tokens of a task's prompts."""
    return int(np.sum([len(pair.clean) for pair in pairs]))
