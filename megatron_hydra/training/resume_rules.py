"""Rules for config keys that change when a run resumes.

Every key has one rule. A new value is applied from the next step on, or it changes only where or how the
same result is computed, or it is refused. No value is accepted and then ignored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megatron_hydra.config.loading import to_dict
from megatron_hydra.config.run import RunConfig
from megatron_hydra.errors import HydraError

Rule = Literal["applied", "free", "same content", "new phase", "refused"]

MEANINGS: dict[Rule, str] = {
    "applied": "the new value is used from the next step on",
    "free": "accepted: it changes where or how the run is computed, not the result",
    "same content": "another path is accepted if the content is the same",
    "new phase": "refused, unless `data.phase` is raised",
    "refused": "refused",
}

RULES: dict[str, tuple[Rule, str]] = {
    "verb": ("refused", "each verb is its own stage"),
    "output": ("free", "the run's folder may be moved"),
    "seed": ("refused", "generators continue from the checkpoint"),
    "precision": ("refused", "the optimizer's state has the precision of the first step"),
    "deterministic": ("free", ""),
    "student.checkpoint": ("same content", "compared by fingerprint"),
    "student.fingerprint": ("applied", "the checkpoint must match it"),
    "teacher.checkpoint": ("same content", "compared by fingerprint"),
    "teacher.fingerprint": ("applied", "the checkpoint must match it"),
    "data.blend": (
        "new phase",
        "sources and weights; a file may be moved and keeps its packing; `max_epochs` is applied",
    ),
    "data.sequence_length": ("refused", "it decides the order of samples"),
    "data.tokenizer": ("same content", "compared by fingerprint"),
    "data.packing": ("refused", "it decides the order of samples"),
    "data.seed": ("refused", "it decides the order of samples"),
    "data.held_out": ("refused", "it decides which documents are trained on"),
    "data.cache_dir": ("free", ""),
    "data.token_budget": ("applied", "counts the tokens of all phases"),
    "data.phase": ("applied", "a higher value begins a phase; a lower value is refused"),
    "batch.micro_batch_size": ("free", ""),
    "batch.global_batch_size": (
        "new phase",
        "the schedule continues by the number of sequences read",
    ),
    "optimizer": ("applied", "the moments are kept"),
    "schedule": ("applied", "as if the run had started with it"),
    "loss": ("applied", ""),
    "parallel": ("free", "equal up to rounding"),
    "parallel.distributed_optimizer": (
        "refused",
        "Megatron-Core stores the states of the two optimizers in different formats",
    ),
    "recompute": ("free", ""),
    "backend": ("free", "equal up to rounding"),
    "checkpoint": ("applied", ""),
    "logging": ("applied", ""),
    "validation": ("applied", ""),
    "validation.blend": ("same content", "only if validation is on"),
    "validation.sequences": (
        "same content",
        "refused if validation is on",
    ),
    "faults": ("applied", "a smaller `spike_window` keeps the newest steps"),
}
"""Key → rule and note. The name of a section applies to all its keys without an own rule."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A key whose values in the checkpoint's config and in the run's config differ."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.before!r} and is {self.after!r} now"


def keys_of(body: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a config; a list is one value."""
    for key, value in body.items():
        if isinstance(value, Mapping):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def rule_of(key: str) -> tuple[Rule, str]:
    """The rule of a dotted key, and its note.

    Raises:
        KeyError: the key has no rule. A test checks that every key of a run has one.
    """
    section = key.partition(".")[0].partition(" ")[0]
    return RULES[key] if key in RULES else RULES[section]


def changes(saved: Mapping[str, Any], config: RunConfig) -> list[Change]:
    """Keys that differ from a checkpoint's config. A key that an older checkpoint lacks has its default.

    Args:
        saved: the ``config`` of a checkpoint's ``training.json``.
        config: the config of the resumed run.
    """
    before = dict(keys_of(_as_stored(RunConfig()))) | dict(keys_of(saved))
    return [
        Change(key, before[key], after)
        for key, after in keys_of(_as_stored(config))
        if before[key] != after
    ]


def _as_stored(config: RunConfig) -> dict[str, Any]:
    """The config after a round trip through JSON, where all keys are strings."""
    return json.loads(json.dumps(to_dict(config)))


def replicas_changed(before: int, after: int) -> list[Change]:
    """A change of the data-parallel size. It is not a key: it follows from world size and layout."""
    return [] if before == after else [Change("parallel (data-parallel size)", before, after)]


def refuse_changes(saved: Mapping[str, Any], config: RunConfig) -> list[Change]:
    """Return all changes, or raise if one is refused. Other code compares checkpoint and data contents.

    Raises:
        HydraError: a key must not change; names the first such key with both values.
    """
    found = changes(saved, config)
    for change in found:
        rule, why = rule_of(change.key)
        if rule == "refused":
            raise HydraError(
                f"cannot resume: {change}; {why}. Resume with the old value, or start a new run (with another "
                "output) from the weights"
            )
    return found


def rules_as_table() -> str:
    """The rules as a Markdown table, for docs/training.md."""
    lines = ["| key | on resume | |", "|---|---|---|"]
    for key, (rule, why) in RULES.items():
        others = any(other.startswith(f"{key}.") for other in RULES)
        is_section = isinstance(to_dict(RunConfig()).get(key), dict)
        name = f"`{key}.*`" if is_section else f"`{key}`"
        lines.append(f"| {name}{', other keys' if others else ''} | {rule} | {why} |")
    return "\n".join(lines)
