"""The interface of a stage (verb): forward step, loss, and trained parameters.

A verb adds its loss sums to one vector, :attr:`Verb.sums`. The loop clears the vector before a step and
sums it over all ranks after the step, so all verbs are logged, normalised and checked in the same way.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_hydra.config.run import RunConfig
from megatron_hydra.ops.linear_distillation_loss import linear_distillation_loss
from megatron_hydra.parallel import platform
from megatron_hydra.parallel.world import World
from megatron_hydra.transfer.answers import AnswerCount
from megatron_hydra.transfer.local_batch import LocalBatch

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Any]]]


def inner_model(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside Megatron's wrappers."""
    return get_attr_wrapped_model(model, "decoder", return_model_obj=True)


def lm_head_weight(model: GPTModel) -> Tensor:
    """This rank's rows ``[V_local, D]`` of the LM head, tied or not, without padding of the vocabulary.

    ``model.vocabulary_shard.first`` is the vocabulary index of the first row.

    The head's own forward is never called, so this function runs its hooks. In one of them Megatron waits
    for the weights that ``overlap_param_gather`` is gathering.
    """
    for hook in model.output_layer._forward_pre_hooks.values():
        hook(model.output_layer, ())
    weight = model.output_layer.weight
    if model.share_embeddings_and_output_weights:
        weight = model.shared_embedding_or_output_weight()
    count = model.vocabulary_shard.count
    return weight if count == weight.shape[0] else weight[:count]


class Verb(abc.ABC):
    """One stage of the transfer on one rank.

    Attributes:
        loss_parts: names of the parts of the loss, in the order of ``sums``.
        uses_teacher: a frozen dense model runs together with the student.
        backward_inside_forward: the verb computes its gradients during the forward. The schedule then
            runs forward only, and pipeline stages send no gradients.
        streams: number of hidden-state streams between pipeline stages, stacked along the sequence.
        sums: ``[num_parts + 1]`` float64: sums of each loss part over this rank's share of the tokens,
            then the number of those tokens.
        is_learning: whether to compute gradients, or only the sums (validation).
        answers: counter of correct answers (probes of a validation); ``None``: do not count.
    """

    loss_parts: tuple[str, ...] = ()
    uses_teacher: ClassVar[bool] = False
    backward_inside_forward: ClassVar[bool] = False
    streams: ClassVar[int] = 1

    def __init__(self, config: RunConfig, world: World, teacher: list[GPTModel]) -> None:
        self.config = config
        self.world = world
        self.teacher = teacher
        self.is_learning = True
        self.answers: AnswerCount | None = None
        self.sums = torch.zeros(
            len(self.loss_parts) + 1, dtype=torch.float64, device=platform.device()
        )

    @abc.abstractmethod
    def forward_step(
        self, batches: Iterator[LocalBatch], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Megatron's forward step for one micro-batch and one model chunk."""

    @abc.abstractmethod
    def metrics(self, means: list[float]) -> dict[str, Any]:
        """Log entries, including ``loss``, from each part's mean over unmasked tokens."""

    def is_trained(self, name: str) -> bool:
        """Whether the student's parameter ``name`` is trained."""
        return True

    def teacher_chunk(self, student: GPTModel) -> GPTModel:
        """The teacher's part of the same virtual pipeline stage."""
        return self.teacher[student.vp_stage or 0]

    def add_sums(self, sums: list[Tensor], num_tokens: int) -> None:
        """Add the sums of a micro-batch on the last stage. TP ranks hold equal copies; only one adds them."""
        if self.world.tp_rank == 0:
            self.sums += torch.stack([*sums, torch.full_like(sums[0], num_tokens)]).double()


def replicate_sequence(hidden: Tensor, world: World, wants_gradient: bool) -> Tensor:
    """Gather last hidden states ``[T_local(/TP), 1, D]`` to ``[T_local, D]`` on every tensor-parallel rank.

    Its backward sums the partial gradients that the vocabulary-parallel loss returns.
    """
    if world.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=wants_gradient
        )
    elif wants_gradient:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    return hidden[:, 0]


def token_count(batch: LocalBatch, device: torch.device) -> Tensor:
    """Number of unmasked tokens of the shard for Megatron: an int32 scalar, made without a device sync."""
    return torch.full((), batch.num_loss_tokens, dtype=torch.int, device=device)


def token_loss(
    verb: Verb,
    batch: LocalBatch,
    student: GPTModel,
    hidden: Tensor,
    teacher: GPTModel | None = None,
    teacher_hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The chunked loss on the last stage in Megatron's form: (sum, number of tokens, empty dict)."""
    settings = verb.config.loss
    if teacher is not None and teacher_hidden is not None:
        teacher_hidden = replicate_sequence(teacher_hidden, verb.world, wants_gradient=False)
    hidden = replicate_sequence(hidden, verb.world, wants_gradient=True)
    if verb.answers is not None:
        weight = lm_head_weight(student)
        verb.answers.add(hidden, weight, student.vocabulary_shard.first, batch)
    result = linear_distillation_loss(
        hidden,
        lm_head_weight(student),
        batch.labels,
        batch.loss_mask,
        teacher_hidden=teacher_hidden,
        teacher_weight=None if teacher is None else lm_head_weight(teacher),
        kl_weight=settings.kl_weight,
        temperature=settings.temperature,
        chunk_tokens=settings.chunk_tokens,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        first_label=student.vocabulary_shard.first,
        fused=False if verb.config.backend.fused_kernels == "torch" else None,
        fp32_logits=settings.logits == "fp32",
    )
    parts = {"kl": result.kl, "ce": result.ce}
    verb.add_sums([parts[name] for name in verb.loss_parts], batch.num_loss_tokens)
    num_tokens = token_count(batch, hidden.device)
    return result.loss, num_tokens, {}
