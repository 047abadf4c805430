"""Provenance of a checkpoint: every stage records its inputs in the manifest; the next stage checks them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_hydra.checkpoint import store
from megatron_hydra.config.loading import to_dict
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.files import sha256_of_file

OTHER_RUN = "give the checkpoint that this run was started from, or choose another output"
"""Advice in the error for a run that is resumed with other inputs."""

_OF_VALIDATION = ("best", "best_step", "waited")


def checkpoint_fingerprint(folder: Path) -> str:
    """Hash of a checkpoint's manifest, which holds the hash of every file."""
    return "sha256:" + sha256_of_file(folder / store.MANIFEST_FILE)


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Inputs of a run, which are fixed when it starts.

    Attributes:
        inputs: role (``student``, ``teacher``) -> path and fingerprint of the checkpoint.
        history: one record for each earlier stage of the student, oldest first.
    """

    inputs: dict[str, dict[str, str]]
    history: list[dict[str, Any]]

    @classmethod
    def of(cls, student: Path, teacher: Path | None) -> Provenance:
        """Read the inputs' manifests."""
        inputs = {}
        for role, folder in (("student", student), ("teacher", teacher)):
            if folder is not None:
                inputs[role] = {
                    "path": str(folder),
                    "fingerprint": checkpoint_fingerprint(folder),
                }
        earlier = store.read_manifest(student).get("provenance", {})
        history = list(earlier.get("history", []))
        return cls(inputs, [*history, {k: v for k, v in earlier.items() if k != "history"}])

    def refuse_other_inputs(self, folder: Path) -> None:
        """Check that a checkpoint belongs to a run with the same input checkpoints.

        Raises:
            HydraError: an input differs; names the role and both checkpoints.
        """
        saved = store.read_manifest(folder).get("provenance", {}).get("inputs", {})
        for role in sorted(saved.keys() | self.inputs.keys()):
            before, now = saved.get(role, {}), self.inputs.get(role, {})
            if before.get("fingerprint") != now.get("fingerprint"):
                raise HydraError(
                    f"cannot resume from {folder}: its {role} was {_named(before)}, this run's is "
                    f"{_named(now)}; {OTHER_RUN}"
                )

    def record(
        self, config: RunConfig, step: int, tokens: int, validation: dict[str, Any], ended: str,
        reading: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """The ``provenance`` of a manifest, JSON.

        Args:
            config: the run.
            step, tokens: steps done and tokens read.
            validation: state of its held-out losses. The record holds the best loss and the number of
                validations without an improvement.
            ended: reason for the end of the run; empty if it has not ended.
            reading: data read so far, by source and span of steps.
        """
        facts = {key: value for key, value in validation.items() if key in _OF_VALIDATION}
        return {
            "stage": config.verb,
            "inputs": self.inputs,
            "step": step,
            "tokens": tokens,
            "ended": ended,
            "validation": facts,
            "data": reading,
            "config": to_dict(config),
            "history": self.history,
        }


def _named(entry: dict[str, str]) -> str:
    return f"{entry['path']} ({entry['fingerprint']})" if entry else "none"


def trained_model_config(model: ModelConfig) -> ModelConfig:
    """The config that a training checkpoint stores.

    ``source.fingerprint`` identifies the weights that a student was made from, so a hybrid keeps it. A
    trained dense model no longer has these weights, so its fingerprint is removed.
    """
    if model.is_hybrid or not model.source.get("fingerprint"):
        return model
    return dataclasses.replace(model, source=dict(model.source) | {"fingerprint": ""})
