"""The tasks of a selection: draw prompts, check which tasks the model solves, estimate the time."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

from megatron_hydra.config.selection import SelectionOptions
from megatron_hydra.errors import HydraError
from megatron_hydra.ranks import is_first_rank
from megatron_hydra.selection.capabilities import (
    DEFAULT_TASKS,
    GROUPS,
    Capability,
    TextCapability,
    make_capability,
)
from megatron_hydra.selection.effects import SENDERS, EffectEngine, Solved, senders_kind
from megatron_hydra.selection.prompts import PromptPair
from megatron_hydra.selection.time_left import in_words

_log = logging.getLogger(__name__)

FEW = 2
"""Minimum number of prompts of every task in the solve check …"""
FEW_IN_ALL = 24
"""… and of all tasks together. If none is solved, no task will have enough solved prompts."""

SHORTEST, ROOM = 256, 64
"""Length of the shortest needle prompts for comparison, and tokens left free after the longest."""

LONG = 600.0
"""If a selection takes more seconds, the message names the options that make it shorter."""

LeftOut = dict[str, dict[str, Any]]
"""Task -> ``drawn`` and ``solved`` prompts, and the ``reason`` in words."""


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The prompts of every task.

    Attributes:
        pairs: task -> its pairs.
        capabilities: capability -> its tasks: several for a group, else the task itself.
        named: capabilities named by the user; the others may be skipped.
        left_out: tasks without prompts for this tokenizer.
        lengths: tokens -> task -> needle pairs of other lengths, for comparison.
    """

    pairs: dict[str, list[PromptPair]]
    capabilities: dict[str, list[str]]
    named: frozenset[str]
    left_out: LeftOut = dataclasses.field(default_factory=dict)
    lengths: dict[int, dict[str, list[PromptPair]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def draw(
        cls,
        tasks: Sequence[str | Capability] | None,
        tokenizer: Any | None,
        vocab_size: int,
        seed: int,
        options: SelectionOptions,
        longest: int = 0,
    ) -> Tasks:
        """Draw prompts of the named capabilities, or of the default capabilities that have prompts.

        A capability with a weight counts as named. In a named group, a task without prompts is skipped if
        another task has prompts.

        Args:
            longest: native context length of the model, the limit for needles of other lengths; 0: no
                comparison.

        Raises:
            HydraError: a task is unknown or given twice, or a named capability has no prompts.
        """
        wanted = DEFAULT_TASKS if tasks is None else tasks
        if not wanted:
            raise HydraError("--tasks: at least one task is needed")
        made: dict[str, list[Capability]] = {}
        names: list[str] = []
        for entry in wanted:
            name, members = _members(entry, options.probe_tokens)
            names += [member.name for member in members]
            made.setdefault(name, []).extend(members)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise HydraError(f"--tasks: {twice[0]} is given twice")
        named = frozenset(made if tasks is not None else options.task_weights)
        drawn = cls({}, {}, named)
        for name, members in made.items():
            drawn._draw_capability(name, members, tokenizer, vocab_size, seed, options, longest)
        for task, facts in drawn.left_out.items():
            _warn(task, facts)
        if not drawn.pairs:
            raise HydraError(
                f"none of the default tasks has prompts for this model ({'; '.join(drawn.left_out)}); give "
                "your own prompts: --tasks jsonl:PATH"
            )
        return drawn

    def _draw_capability(
        self,
        name: str,
        members: list[Capability],
        tokenizer: Any | None,
        vocab_size: int,
        seed: int,
        options: SelectionOptions,
        longest: int,
    ) -> None:
        count = -(-options.num_prompts // len(members))
        errors: list[HydraError] = []
        for member in members:
            try:
                self.pairs[member.name] = member.prompts(tokenizer, vocab_size, count, seed)
            except HydraError as error:
                errors.append(error)
                reason = str(error).removeprefix(f"--tasks {member.name}: ")
                self.left_out[member.name] = {"drawn": 0, "solved": 0, "reason": reason}
                continue
            self.capabilities.setdefault(name, []).append(member.name)
            if isinstance(member, TextCapability):
                for tokens in _other_lengths(member, options, longest):
                    changed = {**member.options, "tokens": str(tokens)}
                    other = dataclasses.replace(member, options=changed)
                    pairs = other.prompts(tokenizer, vocab_size, count, seed)
                    self.lengths.setdefault(tokens, {})[member.name] = pairs
        if name in self.named and len(errors) == len(members):
            raise errors[0]

    def capability_of(self, task: str) -> str:
        """The capability of a task."""
        return next(name for name, tasks in self.capabilities.items() if task in tasks)

    def is_required(self, task: str) -> bool:
        """Whether an unsolved task is an error: the user has named it."""
        name = self.capability_of(task)
        return name in self.named and name == task

    def least(self, task: str, options: SelectionOptions) -> int:
        """Number of solved prompts that a task needs."""
        tasks = self.capabilities[self.capability_of(task)]
        return -(-options.min_prompts // len(tasks))

    def all_pairs(self) -> dict[str, list[PromptPair]]:
        """All pairs to run, including those of other lengths."""
        others = {
            f"{task}@{tokens}": pairs
            for tokens, tasks in self.lengths.items()
            for task, pairs in tasks.items()
        }
        return self.pairs | others


def _members(entry: str | Capability, probe_tokens: int) -> tuple[str, list[Capability]]:
    """A capability's name and its tasks."""
    if not isinstance(entry, str):
        return entry.name, [entry]
    if entry in GROUPS:
        return entry, [make_capability(task, probe_tokens) for task in GROUPS[entry]]
    made = make_capability(entry, probe_tokens)
    return made.name, [made]


def _other_lengths(member: TextCapability, options: SelectionOptions, longest: int) -> list[int]:
    """Other lengths for a task's needles; only for needles of the default length."""
    tokens = options.probe_tokens
    if not longest or member.options.get("tokens") != str(tokens):
        return []
    # The shortest prompt has room for little more than the facts; answers need room after the longest.
    others = (tokens // 4, tokens // 2, 2 * tokens)
    return [n for n in others if n >= SHORTEST and n + ROOM <= longest]


def solved_tasks(
    engine: EffectEngine,
    tasks: Tasks,
    options: SelectionOptions,
    kinds: Sequence[str],
    receivers: int,
    total_heads: int,
) -> tuple[dict[str, Solved], LeftOut]:
    """Find the tasks that the model solves: first with a few prompts of every task, then with all prompts.

    Args:
        kinds: planned measurements of a task (see :meth:`EffectEngine.expect`, also for ``receivers`` and
            ``total_heads``).

    Returns:
        The solved tasks, in order, and the skipped tasks.

    Raises:
        HydraError: a named task, or every task, has fewer than ``options.min_prompts`` solved prompts.
    """
    rest = [kind for kind in kinds if kind != "baseline"]
    expect = functools.partial(engine.expect, receivers=receivers, total_heads=total_heads)
    if engine.bench.shows:
        for task, pairs in tasks.pairs.items():
            expect(task, pairs, kinds, 1.0)
        for tokens, others in tasks.lengths.items():
            for task, pairs in others.items():
                expect(f"{task}@{tokens}", pairs, ["baseline", "receivers"], 1.0)
        engine.time_samples(tasks.pairs.values(), kinds)
        engine.bench.say("if every prompt counts, " + _duration(engine, options, kinds))
    checked = _check(engine, tasks, options)
    if not any(solved for solved, _ in checked.values()):
        raise HydraError(_none_solved_message(checked))
    shares = {task: solved / count for task, (solved, count) in checked.items()}
    if engine.bench.shows:
        for task, share in shares.items():
            expect(task, tasks.pairs[task], rest, share)
        engine.bench.say(_table(engine, checked, tasks))
        engine.bench.say(_duration(engine, options, kinds))
    found: dict[str, Solved] = {}
    left_out = dict(tasks.left_out)
    # The task with the lowest rate first, so that an error comes early.
    for task in sorted(shares, key=lambda task: shares[task]):
        prompts = engine.solve(task, tasks.pairs[task], options.solved)
        reason = _unsolved_reason(prompts, tasks.least(task, options), "attention" in kinds)
        if not reason:
            found[task] = prompts
            continue
        drawn, solved = len(prompts.pairs), len(prompts.keep)
        if tasks.is_required(task):
            raise HydraError(
                f"--tasks {task}: {reason}; remove the task, make it easier, give more prompts "
                "(--num-prompts), or lower --min-prompts"
            )
        left_out[task] = {"drawn": drawn, "solved": solved, "reason": reason}
        _warn(task, left_out[task])
        for name in (task, *(f"{task}@{tokens}" for tokens in tasks.lengths)):
            engine.bench.time_left.drop(name)
    for name, members in tasks.capabilities.items():
        if name in tasks.named and not set(members) & set(found):
            reasons = "; ".join(f"{task}: {left_out[task]['reason']}" for task in members)
            raise HydraError(
                f"--tasks {name}: none of its tasks is solved often enough: {reasons}. Make them easier "
                "(--probe-tokens), give more prompts (--num-prompts), or lower --min-prompts"
            )
    if not found:
        listed = "; ".join(f"{task}: {facts['reason']}" for task, facts in left_out.items())
        raise HydraError(
            f"no default task is solved often enough: {listed}. Lower --min-prompts, give more prompts "
            "(--num-prompts), or give your own prompts (--tasks jsonl:PATH)"
        )
    return {task: found[task] for task in tasks.pairs if task in found}, left_out


def _unsolved_reason(prompts: Solved, minimum: int, looks_for_answer: bool) -> str:
    """Reason why a task cannot be used; empty if it can be."""
    solved, drawn = len(prompts.keep), len(prompts.pairs)
    if solved < minimum:
        return f"the model solves {solved} of {drawn} prompts, at least {minimum} are needed"
    if looks_for_answer and not any(
        prompts.pairs[i].answer[0] in prompts.pairs[i].clean for i in prompts.keep
    ):
        return "attention_mass needs answers that occur in their prompt, and this task has none"
    return ""


def _warn(task: str, facts: dict[str, Any]) -> None:
    if is_first_rank():
        _log.warning("task %s is skipped: %s", task, facts["reason"])


def _check(
    engine: EffectEngine, tasks: Tasks, options: SelectionOptions
) -> dict[str, tuple[int, int]]:
    """Task -> (solved, run) of a few prompts."""
    few = max(FEW, -(-FEW_IN_ALL // len(tasks.pairs)))
    return {
        task: engine.check(task, pairs, options.solved, few) for task, pairs in tasks.pairs.items()
    }


def _none_solved_message(checked: dict[str, tuple[int, int]]) -> str:
    listed = ", ".join(f"{task} {solved} of {run}" for task, (solved, run) in checked.items())
    return (
        f"the model solves no prompt of any task (solve check: {listed}), so its heads cannot be measured; "
        "give easier prompts (needle_single:tokens=64, jsonl:PATH), or use a weaker rule for solved prompts "
        "(--solved pair)"
    )


def _table(engine: EffectEngine, checked: dict[str, tuple[int, int]], tasks: Tasks) -> str:
    """The solve check as text, with the expected time of each task."""
    width = max(len("task"), *map(len, checked))
    lines = [f"{'solve check':<{width}}  solved    will take"]
    for task, (solved, run) in checked.items():
        seconds = engine.bench.time_left.seconds(task=task) or 0.0
        takes = f"about {in_words(seconds)}" if solved else "nothing if it is skipped"
        if not solved and tasks.is_required(task):
            takes = "an error if it stays so"
        lines.append(f"{task:<{width}}  {f'{solved} of {run}':<8}  {takes}")
    return "\n".join(lines)


def _duration(engine: EffectEngine, options: SelectionOptions, kinds: Sequence[str]) -> str:
    """The expected time of the selection, and the options that make it shorter."""
    left = engine.bench.time_left
    whole = left.seconds() or 0.0
    text = f"in all about {in_words(whole)}"
    if whole < LONG:
        return text
    shorter: list[tuple[str, float]] = []
    if (
        "total" in options.exact_effects
        and options.receiver_effect == "direct"
        and "total" in kinds
    ):
        shorter.append(("--effects direct", whole - (left.seconds(kinds=("total",)) or 0.0)))
    if any(kind.startswith(SENDERS) for kind in kinds):
        shorter += _fewer_rounds(engine, options, whole)
        tokens = options.probe_tokens // 8
        if any("needle" in stage.task for stage in left.stages) and tokens >= SHORTEST:
            # The cost of attention grows faster than the length, so this is an upper bound.
            needles = left.seconds(tasks=lambda task: "needle" in task) or 0.0
            shorter.append((f"--probe-tokens {tokens}", whole - needles * 7 / 8))
    fewer = max(options.min_prompts, options.num_prompts // 4)
    if fewer < options.num_prompts:
        shorter.append((f"--num-prompts {fewer}", whole * fewer / options.num_prompts))
    if "attribution" in kinds and options.attribution:
        estimate = left.seconds(kinds=("attribution",)) or 0.0
        shorter.append(("no --attribution", whole - estimate))
    listed = "; ".join(f"{option} makes it about {in_words(s)}" for option, s in shorter)
    return f"{text}; {listed}; --tasks with fewer tasks, as above" if listed else text


def _fewer_rounds(
    engine: EffectEngine, options: SelectionOptions, whole: float
) -> list[tuple[str, float]]:
    """The time saved by fewer rounds of path patching."""
    saved, listed = 0.0, []
    for number in range(options.max_rounds, 0, -1):
        saved += engine.bench.time_left.seconds(kinds=(senders_kind(number),)) or 0.0
        listed.append((f"--max-rounds {number - 1}", whole - saved))
    return listed
