"""A packed stream whose documents are data, not shape: what a CUDA graph of a layer may read.

A CUDA graph replays the same launches on the same addresses. The documents of a :class:`.PackedSequence`
are host integers, which decide grids and are baked into launches. Here everything that depends on them
lives in tensors that keep their place and are filled anew for every micro-batch
(:meth:`StaticSequence.load`):

- positions, and with them rotary tables and the log scale;
- for full attention, the boundaries, with room for more documents than there are;
- for the delta rule, the tokens at which a state starts from zero. The kernels run over rows of one
  length, which no document crosses; inside a row, the decay of a document's first token empties the
  state (:data:`.RESET`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from megatron_hydra.ops.boundaries import DeviceBoundaries
from megatron_hydra.ops.gated_delta_rule import RESET
from megatron_hydra.parallel.packed_sequence import AttentionBlock, PackedSequence


class StaticSequence(PackedSequence):
    """Streams of one length, in rows of one length, with at most so many documents.

    Args:
        length: tokens of the stream.
        row: tokens of a row; divides ``length``.
        room: how many documents boundaries have room for; 0: every row is one document, always.
        device: where it lives.

    Attributes:
        resets: ``[T]`` bool, the first tokens of documents that begin inside a row; ``None`` without room.
    """

    def __init__(self, length: int, row: int, room: int, device: torch.device | str) -> None:
        self._boundaries: torch.Tensor | None = None
        super().__init__(tuple(range(0, length + 1, row)), device=device)
        self.row, self.room = row, room
        self.resets: torch.Tensor | None = None
        self._recipes: dict[Hashable, Callable[[], Any]] = {}
        self._loaded: PackedSequence | None = None
        if room:
            self.resets = torch.zeros(length, dtype=torch.bool, device=device)
            self._boundaries = torch.full(
                (room + 1,), length, dtype=torch.int32, device=self.device
            )

    def holds(self, packed: PackedSequence) -> bool:
        """Whether these documents can be loaded."""
        if packed is self._loaded:
            return True
        if packed.cp_size != 1 or packed.length_global != self.length_global:
            return False
        if not self.room:
            return packed.cu_seqlens == self.cu_seqlens
        return len(packed.cu_seqlens) <= self.room + 1 and set(self.cu_seqlens) <= set(
            packed.cu_seqlens
        )

    def load(self, packed: PackedSequence) -> None:
        """Fill all tensors for the documents of ``packed``, once for every stream.

        On the current stream, which must be the one that reads them.
        """
        if packed is self._loaded:
            return
        assert self.holds(packed), (packed.cu_seqlens[:8], self.row, self.room)
        self._loaded = packed
        self.positions_local.copy_(packed.positions_local)
        if self.resets is not None and self._boundaries is not None:
            torch.eq(self.positions_local, 0, out=self.resets)
            self.resets.view(-1, self.row)[:, 0] = False
            missing = self.room + 1 - len(packed.cu_seqlens)
            padded = (*packed.cu_seqlens, *([self.length_global] * missing))
            self._boundaries.copy_(torch.tensor(padded, dtype=torch.int32), non_blocking=True)
        for key, compute in self._recipes.items():
            _copy(self._cache[key], compute())

    def emptied(self, log_alpha: torch.Tensor) -> torch.Tensor:
        """As of :class:`.PackedSequence`: with room, :data:`.RESET` where a document begins inside a row."""
        if self.resets is None:
            return log_alpha
        resets = self.resets.view(-1, *[1] * (log_alpha.dim() - 1))
        return log_alpha.masked_fill(resets, RESET)

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """``compute()`` into tensors that keep their place; again for every stream that is loaded."""
        if key not in self._cache:
            self._cache[key] = compute()
            if not isinstance(self._cache[key], AttentionBlock):
                self._recipes[key] = compute
        return self._cache[key]

    def attention_block(self, start: int, end: int, window: int | None = None) -> AttentionBlock:
        """As of :class:`.PackedSequence`; with room, of the whole stream, with boundaries on the device."""
        if self._boundaries is None:
            return super().attention_block(start, end, window)
        assert (start, end, window) == (0, self.length_global, None)
        cu: Any = DeviceBoundaries(self._boundaries, self.row)
        return AttentionBlock(0, end, 0, end, cu, cu)


def fitting(packed: PackedSequence, row: int, before: StaticSequence | None) -> StaticSequence:
    """A sequence that holds the documents of ``packed``, and all that ``before`` holds.

    Rows have ``row`` tokens where that divides the stream and no document crosses a multiple of it; else the
    stream is one row. There is room for a quarter more documents, and up to the next power of two.
    """
    length, documents = packed.length_global, len(packed.cu_seqlens) - 1
    if length % row or not set(range(0, length, row)) <= set(packed.cu_seqlens):
        row = length
    if before is not None:
        row = max(row, before.row)
    room = 0
    if documents != length // row:
        room = 1 << (documents + documents // 4).bit_length()
    if before is not None:
        room = max(room, before.room)
    return StaticSequence(length, row, room, packed.device)


def _copy(into: Any, values: Any) -> None:
    if isinstance(into, torch.Tensor):
        into.copy_(values)
        return
    for old, new in zip(into, values, strict=True):
        _copy(old, new)
