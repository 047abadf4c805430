"""Run a ``GPTModel`` without its LM head: losses apply the head per chunk, so full logits never exist."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel

from megatron_hydra.parallel.packed_sequence import PackedSequence


def final_hidden_states(
    model: GPTModel, tokens_local: torch.Tensor | None, packed: PackedSequence
) -> torch.Tensor:
    """Everything of a ``GPTModel`` but its LM head, so that logits need not exist.

    Args:
        model: the bare ``GPTModel`` of this pipeline stage; a stage after the first takes its input
            from ``set_input_tensor``, as in any Megatron-Core schedule.
        tokens_local: ``[T_local]`` token ids of this context-parallel shard (first stage).
        packed: documents and shard.

    Returns:
        ``[T_local, 1, D]`` (``T_local/TP`` under sequence parallelism): after the final norm on the
        last stage, else what goes to the next stage.
    """
    hidden = None
    if model.pre_process:
        if tokens_local is None:
            raise ValueError("the first pipeline stage needs tokens")
        positions = packed.positions_local[None]
        hidden = model.embedding(input_ids=tokens_local[None], position_ids=positions)
    return model.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)
