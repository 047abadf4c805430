"""Run a ``GPTModel`` without its LM head. Losses apply the head in chunks, so full logits never exist."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel

from megatron_hydra.parallel.packed_sequence import PackedSequence


def final_hidden_states(
    model: GPTModel, tokens_local: torch.Tensor | None, packed: PackedSequence
) -> torch.Tensor:
    """Run everything of a ``GPTModel`` except its LM head, so that no logits are needed.

    Args:
        model: the bare ``GPTModel`` of this pipeline stage. A stage after the first gets its input by
            ``set_input_tensor``, as in any Megatron-Core schedule.
        tokens_local: ``[T_local]`` token ids of this context-parallel shard (first stage).
        packed: documents and shard.

    Returns:
        ``[T_local, 1, D]`` (``T_local/TP`` under sequence parallelism): on the last stage after the final norm,
        otherwise the next stage's input.
    """
    hidden = None
    if model.pre_process:
        if tokens_local is None:
            raise ValueError("the first pipeline stage needs tokens")
        positions = packed.positions_local[None]
        hidden = model.embedding(input_ids=tokens_local[None], position_ids=positions)
    return model.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)
