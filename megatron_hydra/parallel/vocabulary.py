"""Padding of a vocabulary whose size is not a multiple of the tensor-parallel size.

Megatron-Core cuts embedding and LM head into equal parts, so with V entries every rank has ⌈V / TP⌉ rows. The
last rows of the last rank are padding. They are zero, and no token id refers to them. Losses and scores do not
use them (:func:`~megatron_hydra.transfer.verb.lm_head_weight` removes them), so their gradient is zero and they
stay zero. A checkpoint has V rows, without padding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch import Tensor

from megatron_hydra.parallel.head_weights import Segment, segments_factory

VOCABULARY_WEIGHTS = ("word_embeddings.weight", "output_layer.weight")
"""Name endings of the weights with one row per vocabulary entry."""


@dataclasses.dataclass(frozen=True)
class VocabularyShard:
    """The entries of the vocabulary on a tensor-parallel rank.

    Attributes:
        total: size of the whole vocabulary, V.
        rows: number of rows of the rank's weights, padding included; the same on every rank.
        first: the rank's first entry.
        ranks: size of the tensor-parallel group.
    """

    total: int
    rows: int
    first: int
    ranks: int

    @classmethod
    def of(cls, total: int, tp_size: int, tp_rank: int) -> VocabularyShard:
        """The shard of one rank."""
        rows = -(-total // tp_size)
        return cls(total, rows, rows * tp_rank, tp_size)

    @property
    def count(self) -> int:
        """Number of rows without padding; 0 if earlier ranks hold all entries."""
        return max(0, min(self.rows, self.total - self.first))

    @property
    def is_padded(self) -> bool:
        """Whether any rank has padding. Then all ranks save their rows by entry."""
        return self.rows * self.ranks != self.total

    def stored(self, entry: ShardedBase, parameter: Tensor) -> ShardedBase:
        """The checkpoint entry ``[V, …]`` of a padded weight: its ``count`` rows without padding.

        Args:
            entry: Megatron's entry of the padded weight, which gives key and replica id.
            parameter: the weight ``[rows, …]``.
        """
        held: Any = tuple(range(self.first, self.first + self.count))
        segments = [Segment("", held, self.total, 0)] if held else []
        return segments_factory(entry.key, parameter, segments, entry.replica_id)
