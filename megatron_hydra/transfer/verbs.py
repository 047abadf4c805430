"""The verbs by name."""

from __future__ import annotations

from megatron_hydra.transfer.align import Align
from megatron_hydra.transfer.distill import Distill
from megatron_hydra.transfer.finetune import NextToken
from megatron_hydra.transfer.verb import Verb

VERBS: dict[str, type[Verb]] = {
    "pretrain": NextToken,
    "align": Align,
    "distill": Distill,
    "finetune": NextToken,
}
