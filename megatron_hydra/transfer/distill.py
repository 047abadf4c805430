"""Stage 2: the student follows the teacher's distribution; everything in the student is trained.

    L = λ·τ²·KL(teacher ‖ student) + (1−λ)·CE

Both models run on the same ranks with the same layout. Pipeline stages send the hidden states of both
models as one tensor, the student's first. The last stage receives the teacher's last hidden states; the
teacher's full logits are never computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_hydra.model.forward import final_hidden_states
from megatron_hydra.transfer.local_batch import LocalBatch
from megatron_hydra.transfer.verb import LossFunction, Verb, inner_model, token_loss


class Distill(Verb):
    """``distill``."""

    uses_teacher = True
    streams = 2
    loss_parts = ("kl", "ce")

    def forward_step(
        self, batches: Iterator[LocalBatch], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """See :meth:`.verb.Verb.forward_step`."""
        batch = next(batches)
        student = inner_model(model)
        teacher = self.teacher_chunk(student)
        _split_input(student, teacher)
        hidden = final_hidden_states(student, batch.tokens, batch.packed)
        with torch.no_grad():
            teacher_hidden = final_hidden_states(teacher, batch.tokens, batch.packed)
        # A schedule passes on only one tensor, also to the loss function.
        both = torch.cat([hidden, teacher_hidden])

        def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            student_half, teacher_half = output.chunk(2)
            return token_loss(self, batch, student, student_half, teacher, teacher_half.detach())

        return both, loss

    def metrics(self, means: list[float]) -> dict[str, Any]:
        """See :meth:`.verb.Verb.metrics`."""
        kl, ce = means
        weight = self.config.loss.kl_weight
        return {"loss": weight * kl + (1 - weight) * ce, "kl": kl, "ce": ce}


def _split_input(student: GPTModel, teacher: GPTModel) -> None:
    """Split the input from the previous pipeline stage (set on the student) between the two models."""
    received = student.decoder.input_tensor
    if received is None:
        return
    student_half, teacher_half = received.chunk(2)
    student.set_input_tensor(student_half)
    teacher.set_input_tensor(teacher_half.detach())
