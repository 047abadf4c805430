"""Split the documents of a source between training and validation (held-out data).

Whole documents are held out, before they are cut, repeated or packed, so that no piece and no copy of one
is on both sides. A document's side is a hash of its number in the file: it depends on no seed, no order, no
length and no layout, so that every stage that holds out the same share holds out the same documents, and a
larger share holds out those of a smaller one and some more.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_hydra.data.sampling import derive_key, mix64_of
from megatron_hydra.errors import HydraError

_KEY = derive_key("held out")


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two sides of a source.

    Attributes:
        held_out: share of the documents that is held out, above 0 and below 1.
        is_validation: whether this is the side that is held out; else that of training.
    """

    held_out: float
    is_validation: bool

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:  # data commands read no more of a config than its data
            raise HydraError(
                f"data.held_out is {self.held_out}: it is a share, at least 0 and below 1"
            )

    def check_not_empty(self, name: str, found: int, documents: int) -> None:
        """Check that this side has at least one document.

        Args:
            name: the source.
            found: its documents on this side that hold a token and are left by ``upsample``.
            documents: all its documents that hold one.

        Raises:
            HydraError: this side has no document.
        """
        if not found:
            what, advice = ("held out", "raise") if self.is_validation else ("trained on", "lower")
            raise HydraError(
                f"{name}: with data.held_out={self.held_out:g} none of its {documents:,} documents is "
                f"{what}; {advice} it, or hold out data of its own (validation.blend)"
            )


def documents_of_side(documents: int, side: Side) -> np.ndarray:
    """Which documents of a source are on a side, bool ``[documents]``."""
    draws = mix64_of(np.arange(documents, dtype=np.uint64) ^ np.uint64(_KEY))
    is_held_out = (draws >> np.uint64(11)).astype(np.float64) < side.held_out * 2.0**53
    return is_held_out == side.is_validation
