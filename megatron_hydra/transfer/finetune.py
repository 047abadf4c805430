"""Stage 3, and pretrain: next-token cross-entropy, everything trained."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_hydra.model.forward import final_hidden_states
from megatron_hydra.transfer.local_batch import LocalBatch
from megatron_hydra.transfer.verb import LossFunction, Verb, inner_model, token_loss


class NextToken(Verb):
    """``pretrain`` and ``finetune``. Logits exist one chunk of tokens at a time."""

    loss_parts = ("ce",)

    def forward_step(
        self, batches: Iterator[LocalBatch], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """See :meth:`.verb.Verb.forward_step`."""
        batch = next(batches)
        student = inner_model(model)
        hidden = final_hidden_states(student, batch.tokens, batch.packed)
        return hidden, functools.partial(token_loss, self, batch, student)

    def metrics(self, means: list[float]) -> dict[str, Any]:
        """See :meth:`.verb.Verb.metrics`."""
        return {"loss": means[0], "ce": means[0]}
