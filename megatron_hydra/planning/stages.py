"""The stages of a transfer: their lengths, batches and shares of the tokens."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from megatron_hydra.config.loading import load_run_config, read_config
from megatron_hydra.config.run import RunConfig, Verb
from megatron_hydra.errors import HydraError

HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class ValidationBudget:
    """Validations of a run.

    Attributes:
        times: number of validations.
        sequences: number of sequences that each reads, with its probes.
    """

    times: int
    sequences: int


def validation_budget(run: RunConfig) -> ValidationBudget | None:
    """The validations of a run's ``validation`` section; ``None`` without validation."""
    wanted, steps = run.validation, run.schedule.steps
    if not wanted.interval:
        return None
    sequences = wanted.sequences + wanted.probe_sequences * len(wanted.probes)
    return ValidationBudget(-(-steps // wanted.interval), sequences)  # the last step is validated


@dataclasses.dataclass(frozen=True)
class StageBudget:
    """One stage.

    Attributes:
        name: of its config file in the recipe's folder.
        verb: of the run.
        sequence_length: tokens of a sequence.
        tokens_per_step: of the global batch.
        share: of all tokens of the transfer.
        validation: its validations, or ``None``.
    """

    name: str
    verb: Verb
    sequence_length: int
    tokens_per_step: int
    share: float
    validation: ValidationBudget | None = None


STAGES = (
    StageBudget("align", "align", 2048, 524_288, 0.14),
    StageBudget("distill", "distill", 4096, 524_288, 0.70),
    StageBudget("finetune", "finetune", 65_536, 1_048_576, 0.14),
    StageBudget("finetune_512k", "finetune", 524_288, 1_048_576, 0.02),
)
"""As in ``configs/qwen3_1.7b/ours`` (a test compares them)."""


def recipe_stages(folder: str | os.PathLike[str]) -> tuple[list[StageBudget], int]:
    """The stages of a recipe, and the tokens of all of them.

    A recipe is a folder of run configs, one for each stage, in the order of their names. A file without a verb
    is merged into the one before it.

    Raises:
        HydraError: no such folder, no configs in it, or a config that cannot be read.
    """
    files = sorted(Path(folder).glob("*.yaml"))
    if not files:
        raise HydraError(
            f"--recipe {folder}: no folder with run configs; configs/qwen3_1.7b holds paper, optimised "
            "and ours"
        )
    budgets, tokens, before = [], [], None
    for file in files:
        overlay = "verb" not in read_config(file)
        if overlay and before is None:
            raise HydraError(f"{file}: the first config of a recipe must name its verb")
        run = load_run_config([before, file] if overlay and before else [file])
        before = before if overlay else file
        per_step = run.batch.global_batch_size * run.data.sequence_length
        tokens.append(run.schedule.steps * per_step)
        budgets.append(
            StageBudget(
                file.stem, run.verb, run.data.sequence_length, per_step, 0.0, validation_budget(run)
            )
        )
    total = sum(tokens)
    shared = [
        dataclasses.replace(budget, share=count / total)
        for budget, count in zip(budgets, tokens, strict=True)
    ]
    return shared, total


def stages_up_to(sequence_length: int) -> list[StageBudget]:
    """The stages of a transfer that ends at ``sequence_length``.

    The last one is the planned length; stages that would be longer are merged into it.
    """
    shorter = [s for s in STAGES if s.sequence_length < sequence_length]
    kept = [s for s in shorter if s.verb != "finetune" or s.name == "finetune"]
    rest = 1.0 - sum(s.share for s in kept)
    verbs = {s.verb for s in kept}
    last = STAGES[-1]
    ending = dataclasses.replace(last, sequence_length=sequence_length, share=rest)
    if "finetune" in verbs:
        return [*kept, dataclasses.replace(ending, name="finetune_long")]
    short = [
        dataclasses.replace(s, sequence_length=min(s.sequence_length, sequence_length))
        for s in STAGES
        if s.verb != "finetune"
    ]
    rest = 1.0 - sum(s.share for s in short)
    return [*short, dataclasses.replace(ending, name="finetune", share=rest)]
