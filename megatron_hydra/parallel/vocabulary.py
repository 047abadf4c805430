"""A vocabulary that tensor-parallel ranks do not divide, padded on the ranks and nowhere else.

Megatron-Core cuts embedding and LM head into equal parts, so a vocabulary of V entries gets ⌈V / TP⌉ rows on
every rank; the last rank's last rows stand for no token. They hold zeros, no token id names them, losses and
scores never see them (:func:`~megatron_hydra.transfer.verb.lm_head_weight` leaves them out), so their gradient
is zero and they stay zero; a checkpoint has V rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch import Tensor

from megatron_hydra.parallel.head_weights import Segment, segments_factory

VOCABULARY_WEIGHTS = ("word_embeddings.weight", "output_layer.weight")
"""Ends of the names of what has a row for each entry."""


@dataclasses.dataclass(frozen=True)
class VocabularyShard:
    """Which entries of the vocabulary a tensor-parallel rank holds.

    Attributes:
        total: entries of the whole vocabulary, V.
        rows: of the rank's weights, padding included; the same on every rank.
        first: the rank's first entry.
        ranks: of the tensor-parallel group.
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
        """Rows that stand for an entry; 0 where earlier ranks hold all of them."""
        return max(0, min(self.rows, self.total - self.first))

    @property
    def is_padded(self) -> bool:
        """Whether some rank has padding: all of them then store their rows by entry."""
        return self.rows * self.ranks != self.total

    def stored(self, entry: ShardedBase, parameter: Tensor) -> ShardedBase:
        """A weight of ``rows`` rows as the ``count`` that belong into a checkpoint ``[V, …]``.

        Args:
            entry: Megatron's, of the padded weight: its key and replica id are taken over.
            parameter: the weight ``[rows, …]``.
        """
        held: Any = tuple(range(self.first, self.first + self.count))
        segments = [Segment("", held, self.total, 0)] if held else []
        return segments_factory(entry.key, parameter, segments, entry.replica_id)
