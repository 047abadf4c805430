"""Stage 1: every hybrid attention learns separately to give the outputs of the teacher's attention.

    L = Σ_ℓ mean over channels ‖A_teacher^ℓ(x_ℓ) − A_hybrid^ℓ(x_ℓ)‖²,   summed over unmasked tokens

The input x_ℓ of each layer is the *teacher's* hidden state, so layers are independent. The backward of a
layer runs directly after its forward and frees its graph. No backward crosses layers or pipeline stages.
The residual is equal on both sides and cancels. Comparing the attention outputs therefore compares the
hidden states after the attention. Only the hybrid attention is trained.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_hydra.config.run import RunConfig
from megatron_hydra.model.forward import final_hidden_states
from megatron_hydra.ops.squared_error import squared_error
from megatron_hydra.parallel.world import World
from megatron_hydra.transfer.local_batch import LocalBatch
from megatron_hydra.transfer.verb import LossFunction, Verb, inner_model, token_count


class Align(Verb):
    """``align``."""

    uses_teacher = True
    backward_inside_forward = True

    def __init__(self, config: RunConfig, world: World, teacher: list[GPTModel]) -> None:
        num_layers = teacher[0].config.num_layers
        self.loss_parts = tuple(f"layer_{layer}" for layer in range(num_layers))
        super().__init__(config, world, teacher)

    def is_trained(self, name: str) -> bool:
        """See :meth:`.verb.Verb.is_trained`."""
        return ".self_attention." in name

    def forward_step(
        self, batches: Iterator[LocalBatch], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """See :meth:`.verb.Verb.forward_step`."""
        batch = next(batches)
        student = inner_model(model)
        teacher = self.teacher_chunk(student)
        if student.decoder.input_tensor is not None:
            teacher.set_input_tensor(student.decoder.input_tensor)
        with self._layers_compared(student, teacher, batch), torch.no_grad():
            hidden = final_hidden_states(teacher, batch.tokens, batch.packed)
        if self.world.tp_rank == 0 and student.post_process:
            self.sums[-1] += batch.num_loss_tokens

        def no_loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            return output.new_zeros(()), token_count(batch, output.device), {}

        return hidden, no_loss

    def metrics(self, means: list[float]) -> dict[str, Any]:
        """See :meth:`.verb.Verb.metrics`."""
        return {"loss": sum(means), "layers": means}

    @contextlib.contextmanager
    def _layers_compared(
        self, student: GPTModel, teacher: GPTModel, batch: LocalBatch
    ) -> Iterator[None]:
        """While the block is open, train the student's attention in every layer that the teacher runs."""
        mask = self._mask_of_this_rank(batch)
        hooks = []
        for ours, theirs in zip(student.decoder.layers, teacher.decoder.layers, strict=True):
            compare = functools.partial(self._compare, ours, mask, batch)
            hooks.append(theirs.self_attention.register_forward_hook(compare, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _compare(
        self,
        layer: Any,
        mask: Tensor,
        batch: LocalBatch,
        _attention: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: tuple[Tensor, Tensor | None],
    ) -> None:
        """Forward hook of the teacher's attention."""
        attention_input = args[0] if args else kwargs["hidden_states"]
        self._train_layer(layer, attention_input, _joined(output), mask, batch)

    def _mask_of_this_rank(self, batch: LocalBatch) -> Tensor:
        """``[T_local(/TP)]`` bool, sliced like the activations under sequence parallelism."""
        mask = batch.loss_mask != 0
        if self.world.sequence_parallel:
            mask = mask.chunk(self.world.tp_size)[self.world.tp_rank]
        return mask

    def _train_layer(
        self, layer: Any, x: Tensor, target: Tensor, mask: Tensor, batch: LocalBatch
    ) -> None:
        """Loss and gradient of one layer on one micro-batch; ``x`` and ``target`` ``[T, 1, D]``."""
        with torch.set_grad_enabled(self.is_learning):
            output = _joined(
                layer.self_attention(
                    x.detach(), attention_mask=None, packed_seq_params=batch.packed
                )
            )
        fused = False if self.config.backend.fused_kernels == "torch" else None
        loss, gradient = squared_error(output[:, 0], target[:, 0], mask, fused)
        if self.is_learning:
            output.backward(gradient[:, None])
        if self.world.sequence_parallel or self.world.tp_rank == 0:
            self.sums[layer.layer_number - 1] += loss


def _joined(output: tuple[Tensor, Tensor | None]) -> Tensor:
    """Add the bias of the output projection, which Megatron's attention returns separately."""
    result, bias = output
    return result if bias is None else result + bias
