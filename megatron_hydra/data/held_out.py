"""Split the documents of a source between training and validation (held-out data).

Whole documents are held out before they are cut, repeated or packed, so no piece and no copy of a document
is on both sides. A hash of a document's number in the file decides its side. It does not depend on seed,
order, length or layout. So all stages with the same share hold out the same documents, and a larger share
holds out the documents of a smaller share and others.
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
        is_validation: whether this is the held-out side; else it is the side of training.
    """

    held_out: float
    is_validation: bool

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:  # data commands do not validate the whole config
            raise HydraError(
                f"data.held_out is {self.held_out}: it is a share, at least 0 and below 1"
            )

    def check_not_empty(self, name: str, found: int, documents: int) -> None:
        """Check that this side has at least one document.

        Args:
            name: the source.
            found: number of its documents on this side that have a token and are kept by ``upsample``.
            documents: number of all its documents that have a token.

        Raises:
            HydraError: this side has no document.
        """
        if not found:
            what, advice = ("held out", "raise") if self.is_validation else ("trained on", "lower")
            raise HydraError(
                f"{name}: with data.held_out={self.held_out:g} none of its {documents:,} documents is "
                f"{what}; {advice} it, or name separate validation data (validation.blend)"
            )


def documents_of_side(documents: int, side: Side) -> np.ndarray:
    """Mask of a source's documents on a side, bool ``[documents]``."""
    draws = mix64_of(np.arange(documents, dtype=np.uint64) ^ np.uint64(_KEY))
    is_held_out = (draws >> np.uint64(11)).astype(np.float64) < side.held_out * 2.0**53
    return is_held_out == side.is_validation
