"""What becomes of a key of the config that is given anew when a run is resumed.

Every key has one rule. Nothing is accepted and then not used: a key is applied from the next step on, or
it says only where and how the same is computed, or another value is refused.
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
    "applied": "the new value holds from the next step on",
    "free": "says where or how the same is computed",
    "same content": "may name another place; other content is refused",
    "new phase": "another value is refused, unless `data.phase` is raised",
    "refused": "another value is refused",
}

RULES: dict[str, tuple[Rule, str]] = {
    "verb": ("refused", "another verb is another stage"),
    "output": ("free", "a run's folder may be moved"),
    "seed": ("refused", "generators go on from the checkpoint"),
    "precision": ("refused", "the optimizer's state is of the precision that it began with"),
    "deterministic": ("free", ""),
    "student.checkpoint": ("same content", "compared by fingerprint"),
    "student.fingerprint": ("applied", "the checkpoint has to have it"),
    "teacher.checkpoint": ("same content", "compared by fingerprint"),
    "teacher.fingerprint": ("applied", "the checkpoint has to have it"),
    "data.blend": (
        "new phase",
        "parts and weights; a file may be moved, its packing stays; `max_epochs` is applied",
    ),
    "data.sequence_length": ("refused", "it decides which sample comes when"),
    "data.tokenizer": ("same content", "compared by fingerprint"),
    "data.packing": ("refused", "it decides which sample comes when"),
    "data.seed": ("refused", "it decides which sample comes when"),
    "data.held_out": ("refused", "it decides which documents are trained on"),
    "data.cache_dir": ("free", ""),
    "data.token_budget": ("applied", "over all phases"),
    "data.phase": ("applied", "may be raised, which begins a phase; refused if lower"),
    "batch.micro_batch_size": ("free", ""),
    "batch.global_batch_size": ("new phase", "the schedule goes on by the sequences read"),
    "optimizer": ("applied", "moments are kept"),
    "schedule": ("applied", "as if the run had begun with it"),
    "loss": ("applied", ""),
    "parallel": ("free", "equal up to rounding"),
    "parallel.distributed_optimizer": (
        "refused",
        "Megatron-Core stores the two optimizers' state in different ways",
    ),
    "recompute": ("free", ""),
    "backend": ("free", "equal up to rounding"),
    "checkpoint": ("applied", ""),
    "logging": ("applied", ""),
    "validation": ("applied", ""),
    "validation.blend": ("same content", "while validation is on"),
    "validation.sequences": (
        "same content",
        "how much is measured; refused while validation is on",
    ),
    "faults": ("applied", "a smaller `spike_window` keeps the newest steps"),
}
"""Key, or section for those of its keys that have no rule of their own → rule and note."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A key whose value in the checkpoint's config is another than in the run's."""

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
    """The rule of a dotted key, and why.

    Raises:
        KeyError: it has none, which a test excludes for all keys of a run.
    """
    section = key.partition(".")[0].partition(" ")[0]
    return RULES[key] if key in RULES else RULES[section]


def changes(saved: Mapping[str, Any], config: RunConfig) -> list[Change]:
    """Keys that differ from a checkpoint's config; one that it lacks (an older release's) had its default.

    Args:
        saved: the ``config`` of a checkpoint's ``training.json``.
        config: of the run that goes on.
    """
    before = dict(keys_of(_as_stored(RunConfig()))) | dict(keys_of(saved))
    return [
        Change(key, before[key], after)
        for key, after in keys_of(_as_stored(config))
        if before[key] != after
    ]


def _as_stored(config: RunConfig) -> dict[str, Any]:
    """As JSON gives it back: its keys are strings."""
    return json.loads(json.dumps(to_dict(config)))


def replicas_changed(before: int, after: int) -> list[Change]:
    """The data-parallel size is no key: it is what the layout leaves of the world."""
    return [] if before == after else [Change("parallel (data-parallel size)", before, after)]


def refuse_changes(saved: Mapping[str, Any], config: RunConfig) -> list[Change]:
    """What changed, if all of it may. Contents of checkpoints and data are compared elsewhere.

    Raises:
        HydraError: naming the first key that may not change, with both values.
    """
    found = changes(saved, config)
    for change in found:
        rule, why = rule_of(change.key)
        if rule == "refused":
            raise HydraError(
                f"cannot resume: {change}; {why}; resume with the old value, or start a new run (another "
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
        lines.append(f"| {name}{', the others' if others else ''} | {rule} | {why} |")
    return "\n".join(lines)
