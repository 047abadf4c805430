"""Per-head weights: fused on the rank, stored by head (design §6, checkpoints).

On a rank, the weights of many heads and projections are rows of one matrix, so that one GEMM computes all. On
disk every head is one slice of a tensor ``[heads, …]`` in original head order. :class:`Segment` describes the
rows. :func:`segments_factory` turns a fused parameter and its optimizer state into these slices and back. Files
do not depend on row order, tensor-parallel size or padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensorFactory,
)

ROW_MULTIPLE = 16
"""The rows of the input projection are padded to a multiple of this number. One β and one a logit per head
would give other numbers. If the rows of a GEMM do not start at a multiple of 16 bytes (FP8: 16 elements), it
falls back to kernels of an older GPU, which take more than three times as long."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive rows (or columns) of a fused weight that belong to one projection.

    Attributes:
        key: the projection's canonical name below the layer's, e.g. ``fa.q``.
        slots: for each local entry its index along the first axis of the canonical tensor.
        total: length of this axis (all ranks together).
        size: number of rows per entry; an entry of size 0 has one row and no own axis (β and a logits).
    """

    key: str
    slots: tuple[int, ...]
    total: int
    size: int

    @property
    def rows(self) -> int:
        """Number of rows of the whole segment."""
        return len(self.slots) * max(self.size, 1)


def total_rows(segments: Sequence[Segment]) -> int:
    """Total number of rows of all segments."""
    return sum(segment.rows for segment in segments)


def padded_rows(segments: Sequence[Segment]) -> int:
    """Total number of rows of all segments, rounded up to a multiple of :data:`ROW_MULTIPLE`."""
    return -(-total_rows(segments) // ROW_MULTIPLE) * ROW_MULTIPLE


def joined(segments: Sequence[Segment], keys: Sequence[str], name: str) -> tuple[Segment, ...]:
    """The segments with those of ``keys`` (neighbours, in this order) joined to one called ``name``.

    Only for splitting: checkpoints keep the separate segments.
    """
    run = [segment for segment in segments if segment.key in keys]
    if not run:
        return tuple(segments)
    start = segments.index(run[0])
    assert [segment.key for segment in segments[start : start + len(run)]] == list(keys)
    rows = total_rows(run)
    whole = Segment(name, tuple(range(rows)), rows, 1)
    return (*segments[:start], whole, *segments[start + len(run) :])


def split_segments(
    x: torch.Tensor, segments: Sequence[Segment], dim: int
) -> dict[str, torch.Tensor]:
    """Split a fused tensor along ``dim`` by segment; padding after the last segment is dropped."""
    sizes = [segment.rows for segment in segments]
    # Padding (often none) is a separate piece: the backward of a slice would copy all other pieces.
    *pieces, _ = x.split([*sizes, x.shape[dim] - sum(sizes)], dim=dim)
    return {segment.key: piece for segment, piece in zip(segments, pieces, strict=True)}


def runs_of(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of neighbouring slots, in order: (first slot, number of slots)."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and slot == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((slot, 1))
    return runs


def _by_entry(rows: torch.Tensor, segment: Segment, axis: int) -> torch.Tensor:
    """A segment's rows along ``axis`` as ``[entries, …]``, in the format of a checkpoint."""
    if segment.size:
        rows = rows.unflatten(axis, (len(segment.slots), segment.size))
    return rows.movedim(axis, 0)


def _by_row(entries: torch.Tensor, segment: Segment, axis: int) -> torch.Tensor:
    """Inverse of :func:`_by_entry`."""
    rows = entries.movedim(0, axis)
    return rows.flatten(axis, axis + 1) if segment.size else rows


def segments_factory(
    key: str,
    parameter: torch.Tensor,
    segments: Sequence[Segment],
    replica_id: tuple[int, int, int],
    axis: int = 0,
) -> ShardedTensorFactory:
    """A fused parameter as canonical per-head slices for ``dist_checkpointing``.

    Neighbouring slices are joined: if one rank has all heads, a segment is one part.

    Args:
        key: canonical prefix; a segment's tensor is ``{key}.{segment.key}`` (``{key}`` for ``""``).
        parameter: the local fused tensor, possibly with padding after the last segment.
        segments: its content along ``axis``.
        replica_id: Megatron-Core's replica id; all zero on exactly one copy.
        axis: the fused axis. Slices are stored with the head axis first.
    """

    def build(
        key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: Any
    ) -> list[ShardedTensor | LocalNonpersistentObject]:
        shards: list[ShardedTensor | LocalNonpersistentObject] = []
        pieces = split_segments(tensor.detach(), segments, axis)
        for segment in segments:
            entries = _by_entry(pieces[segment.key], segment, axis)
            runs = runs_of(segment.slots)
            for (slot, _), part in zip(
                runs, entries.split([count for _, count in runs]), strict=True
            ):
                shards.append(
                    ShardedTensor(
                        f"{key}.{segment.key}" if segment.key else key,
                        part,
                        part.dtype,
                        local_shape=tuple(part.shape),
                        global_shape=(segment.total, *part.shape[1:]),
                        global_offset=(slot, *(0 for _ in part.shape[1:])),
                        axis_fragmentations=None,  # no regular grid: runs have any length
                        replica_id=replica_id,
                    )
                )
        # All padding: dist_checkpointing drops an empty list and would miss the parameter at load.
        return shards or [LocalNonpersistentObject(None)]

    def merge(loaded: list[torch.Tensor]) -> torch.Tensor:
        parts = iter(loaded if segments else ())
        pieces = []
        for segment in segments:
            entries = torch.cat([next(parts) for _ in runs_of(segment.slots)])
            pieces.append(_by_row(entries, segment, axis))
        merged = torch.cat(pieces, axis) if pieces else parameter.detach().narrow(axis, 0, 0)
        missing = parameter.shape[axis] - merged.shape[axis]
        if missing:
            padding = list(merged.shape)
            padding[axis] = missing
            merged = torch.cat((merged, merged.new_zeros(padding)), axis)
        return merged

    return ShardedTensorFactory(key, parameter, build, merge, replica_id)
