"""The stages of a transfer: their lengths, batches and shares of the tokens."""

from __future__ import annotations

import dataclasses

from megatron_hydra.config.run import Verb

HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class StageBudget:
    """One stage.

    Attributes:
        name: of its config in ``configs/qwen3_1.7b``.
        verb: what it does.
        sequence_length: tokens of a sequence.
        tokens_per_step: of the global batch.
        share: of all tokens of the transfer.
    """

    name: str
    verb: Verb
    sequence_length: int
    tokens_per_step: int
    share: float


STAGES = (
    StageBudget("align", "align", 2048, 524_288, 0.14),
    StageBudget("distill", "distill", 4096, 524_288, 0.70),
    StageBudget("finetune", "finetune", 65_536, 1_048_576, 0.14),
    StageBudget("finetune_512k", "finetune", 524_288, 1_048_576, 0.02),
)
"""As in ``configs/qwen3_1.7b`` (a test holds them together)."""


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
