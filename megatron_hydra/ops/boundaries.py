"""Document boundaries that live on the device: kernels that read them need not be launched anew for others."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class DeviceBoundaries:
    """Boundaries of the documents of a stream of T tokens, in place of a tuple of host integers.

    Attributes:
        tensor: ``[n + 1]`` int32 on the device, ``0 … T``. Entries after the last document are T: documents
            without tokens.
        longest: no document has more tokens.
    """

    tensor: torch.Tensor
    longest: int


Boundaries = tuple[int, ...] | DeviceBoundaries


def on_host(boundaries: Boundaries) -> tuple[int, ...]:
    """The boundaries of the documents that have tokens; waits for the device where they live there."""
    if isinstance(boundaries, tuple):
        return boundaries
    return tuple(torch.unique_consecutive(boundaries.tensor).tolist())
