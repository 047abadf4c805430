"""The most likely tokens of a model, and the number of documents that it answers correctly."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_hydra.transfer.local_batch import LocalBatch

HEAD_ROWS = 1024
"""Number of positions whose logits are in memory at a time."""


def likeliest_tokens(hidden: torch.Tensor, weight: torch.Tensor, first: int) -> torch.Tensor:
    """The most likely token of all vocabulary shards; of equal ones, the first.

    Args:
        hidden: ``[N, D]`` last hidden states, equal on all tensor-parallel ranks.
        weight: ``[V_local, D]`` this rank's rows of the LM head.
        first: vocabulary index of the first of these rows.

    Returns:
        ``[N]`` int64, equal on all tensor-parallel ranks.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    above_all = torch.iinfo(torch.int64).max
    tokens = [torch.empty(0, dtype=torch.int64, device=hidden.device)]
    for rows in hidden.split(HEAD_ROWS):
        best, token = (rows @ weight.T).float().max(dim=-1)
        best = best.nan_to_num(nan=-torch.inf)  # a NaN is a wrong answer, not an error
        top = best.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        token = token + first
        token = token.masked_fill(best < top, above_all)
        dist.all_reduce(token, op=dist.ReduceOp.MIN, group=group)
        tokens.append(token)
    return torch.cat(tokens)


class AnswerCount:
    """Count documents with an answer, and those that the model answers correctly.

    A document's answer is its tokens with a loss. It is correct if each of them is the most likely token
    after the tokens before it. Greedy decoding would then give this answer.

    Attributes:
        sums: ``[2]`` float64, number of documents with an answer, and of correct answers, on this rank. Every
            document is counted on one rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(
        self, hidden: torch.Tensor, weight: torch.Tensor, first: int, batch: LocalBatch
    ) -> None:
        """Count a micro-batch. Collective over tensor- and context-parallel ranks of the last stage.

        Args:
            hidden: ``[T_local, D]`` last hidden states of this context-parallel shard.
            weight, first: as for :func:`likeliest_tokens`.
            batch: the shard.
        """
        packed = batch.packed
        places = torch.nonzero(batch.loss_mask).squeeze(1)
        said = likeliest_tokens(hidden[places], weight, first)
        bounds = torch.tensor(packed.cu_seqlens[1:], device=hidden.device)
        document = torch.searchsorted(bounds, places + packed.shard_start, right=True)
        # [answer tokens, wrong ones] of every document of the stream; a document may span several shards.
        counts = torch.zeros(2, len(bounds), dtype=torch.float64, device=hidden.device)
        is_wrong = said != batch.labels[places]
        counts[0].index_add_(0, document, torch.ones_like(document, dtype=torch.float64))
        counts[1].index_add_(0, document, is_wrong.double())
        dist.all_reduce(counts, group=parallel_state.get_context_parallel_group())
        if (
            parallel_state.get_tensor_model_parallel_rank()
            or parallel_state.get_context_parallel_rank()
        ):
            return
        asked = counts[0] > 0
        self.sums += torch.stack([asked.sum(), (asked & (counts[1] == 0)).sum()]).double()
