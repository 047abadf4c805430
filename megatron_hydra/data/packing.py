"""Packing documents into sequences of S tokens.

Three strategies. ``best_fit`` keeps every document whole (best-fit decreasing) and refuses documents longer
than S. ``split_long`` first cuts longer documents into pieces of S tokens and a rest, then packs pieces and
whole documents by best fit. ``concat_chunk`` joins shuffled documents and cuts every S tokens: no waste, but
most cuts are inside a document. For the model a piece is a separate document: positions, state and loss start
again, and no information crosses its bounds.
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any, Literal

import numpy as np

from megatron_hydra.errors import HydraError

Packing = Literal["best_fit", "split_long", "concat_chunk"]


@dataclasses.dataclass(frozen=True)
class Packs:
    """The pieces of documents in each packed sequence.

    Attributes:
        starts: ``[packs + 1]`` int64; pack p has pieces ``starts[p] … starts[p+1]−1``.
        offsets: ``[pieces]`` int64, first token of each piece in the source.
        lengths: ``[pieces]`` int32, number of tokens of each piece.
        sequence_length: S, the maximum number of tokens of a pack.
    """

    starts: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    sequence_length: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def pieces(self, pack: int) -> list[tuple[int, int]]:
        """(offset, length) of every piece of one pack, in order."""
        span = slice(int(self.starts[pack]), int(self.starts[pack + 1]))
        return list(zip(self.offsets[span].tolist(), self.lengths[span].tolist(), strict=True))

    def pieces_in(self, packs: np.ndarray) -> int:
        """Total number of pieces of these packs."""
        return int((self.starts[packs + 1] - self.starts[packs]).sum())

    def tokens_in(self, packs: np.ndarray) -> int:
        """Total number of tokens of these packs, without padding."""
        starts, counts = self.starts[packs], self.starts[packs + 1] - self.starts[packs]
        firsts = np.cumsum(counts) - counts
        pieces = np.arange(int(counts.sum())) + np.repeat(starts - firsts, counts)
        return int(self.lengths[pieces].sum(dtype=np.int64))

    def waste(self) -> float:
        """Share of the packs' tokens that is padding."""
        used = int(self.lengths.sum(dtype=np.int64))
        return 1.0 - used / (len(self) * self.sequence_length)


def pack_documents(
    offsets: np.ndarray,
    lengths: np.ndarray,
    sequence_length: int,
    packing: Packing,
    seed: int,
    name: str,
) -> Packs:
    """Pack documents.

    Args:
        offsets, lengths: ``[documents]`` int64, in tokens; empty documents are omitted.
        sequence_length: S.
        packing: the strategy.
        seed: seed of the order of documents (and of pieces within a pack).
        name: name of the source, for messages.

    Raises:
        HydraError: a document is longer than S with ``best_fit``, or no document has a token.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    order = rng.permutation(len(lengths))
    order = order[lengths[order] > 0]
    if len(order) == 0:
        raise HydraError(f"{name} is empty: it has no document with a token to pack")
    offsets, lengths = offsets[order], lengths[order]
    if packing == "concat_chunk":
        return _concat_chunk(offsets, lengths, sequence_length)
    if packing == "best_fit":
        longest = int(np.argmax(lengths))
        if lengths[longest] > sequence_length:
            raise HydraError(
                f"{name}: document {order[longest]:,} has {lengths[longest]:,} tokens, above "
                f"data.sequence_length {sequence_length:,}, and packing best_fit keeps documents "
                "whole; use data.packing=split_long"
            )
    else:
        offsets, lengths = _split(offsets, lengths, sequence_length)
    return _best_fit_packs(offsets, lengths, sequence_length, rng)


def _split(offsets: np.ndarray, lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into pieces of ``size`` tokens and a rest."""
    counts = -(-lengths // size)
    owner = np.repeat(np.arange(len(lengths)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return offsets[owner] + rank * size, np.minimum(lengths[owner] - rank * size, size)


def _concat_chunk(offsets: np.ndarray, lengths: np.ndarray, size: int) -> Packs:
    """Join documents; cut at document ends and at every multiple of ``size``."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    cuts = np.union1d(begins, np.arange(0, int(ends[-1]), size))
    owner = np.searchsorted(begins, cuts, side="right") - 1
    piece_lengths = np.diff(np.append(cuts, ends[-1]))
    packs = int(-(-ends[-1] // size))
    starts = np.searchsorted(cuts, np.arange(packs + 1) * size)
    return Packs(
        starts.astype(np.int64),
        offsets[owner] + (cuts - begins[owner]),
        piece_lengths.astype(np.int32),
        size,
    )


def _best_fit_packs(
    offsets: np.ndarray, lengths: np.ndarray, size: int, rng: np.random.Generator
) -> Packs:
    by_length = np.argsort(-lengths, kind="stable")
    pack_of, packs = best_fit_decreasing(lengths[by_length], size)
    order = by_length[np.lexsort((rng.random(len(pack_of)), pack_of))]
    starts = np.zeros(packs + 1, dtype=np.int64)
    np.cumsum(np.bincount(pack_of, minlength=packs), out=starts[1:])
    return Packs(starts, offsets[order].astype(np.int64), lengths[order].astype(np.int32), size)


def best_fit_decreasing(lengths: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing bin packing, in batches of equal length.

    Each item goes into the fullest bin with enough room. Items of equal length are placed together: the
    fullest bin with room takes as many as fit, then the next bin, and so on. The result equals placing the
    items one by one.

    Args:
        lengths: ``[n]``, descending, each in 1 … ``size``.
        size: capacity of a bin.

    Returns:
        The bin of every item, int64 ``[n]``, and the number of bins.
    """
    free = _FreeBins(size)
    bin_of = np.empty(len(lengths), dtype=np.int64)
    edges = np.flatnonzero(np.diff(lengths)) + 1
    for first, last in zip([0, *edges.tolist()], [*edges.tolist(), len(lengths)], strict=True):
        length = int(lengths[first])
        while first < last:
            room, bins, each = free.take(length, last - first)
            placed = np.repeat(bins, each)
            bin_of[first : first + len(placed)] = placed
            first += len(placed)
            free.put(room - each * length, bins)
    return bin_of, free.count


class _FreeBins:
    """Open bins, ordered by free room."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._rooms: list[int] = []
        self._bins: dict[int, list[np.ndarray]] = {}

    def take(self, length: int, items: int) -> tuple[int, np.ndarray, int]:
        """Take bins for up to ``items`` items; return their free room, their numbers, and the items of each."""
        at = bisect.bisect_left(self._rooms, length)
        room = self._rooms[at] if at < len(self._rooms) else self.size
        each = min(room // length, items)
        wanted = items // each
        if at == len(self._rooms):
            bins = np.arange(self.count, self.count + wanted)
            self.count += wanted
            return room, bins, each
        blocks = self._bins[room]
        block = blocks.pop()
        bins, rest = block[:wanted], block[wanted:]
        if len(rest):
            blocks.append(rest)
        if not blocks:
            del self._bins[room], self._rooms[at]
        return room, bins, each

    def put(self, room: int, bins: np.ndarray) -> None:
        """Put bins back with their remaining room."""
        if room == 0:
            return
        if room not in self._bins:
            bisect.insort(self._rooms, room)
            self._bins[room] = []
        self._bins[room].append(bins)


def upsample_factors(given: dict[Any, Any], name: str) -> dict[int, float]:
    """``data.blend[].upsample`` with its types checked: smallest length of a bucket → factor.

    Raises:
        HydraError: a key is not a whole number ≥ 0, or a factor is not a number ≥ 0.
    """
    factors: dict[int, float] = {}
    try:
        for minimum, factor in given.items():
            factors[int(minimum)] = float(factor)
            if float(minimum) != int(minimum) or int(minimum) < 0:
                raise ValueError
            if not 0 <= float(factor) < float("inf"):
                raise ValueError
    except (TypeError, ValueError) as error:
        raise HydraError(
            f"{name}: upsample {given} needs lengths in tokens (whole numbers >= 0) and factors "
            ">= 0, as in {0: 0.5, 32768: 2}"
        ) from error
    return factors


def upsample(lengths: np.ndarray, factors: dict[int, float], seed: int, name: str) -> np.ndarray:
    """The documents of an epoch if length buckets are weighted.

    A document of the bucket with factor f appears ⌊f⌋ times, and once more with probability
    f − ⌊f⌋ (seeded); f = 0 drops the bucket.

    Args:
        lengths: ``[documents]`` tokens.
        factors: smallest length of a bucket → factor; below the smallest key the factor is 1.
        seed: seed of the fractional part.
        name: name of the source, for messages.

    Returns:
        Document numbers with repeats, int64.

    Raises:
        HydraError: factors are invalid, or no document remains.
    """
    factors = upsample_factors(factors, name)
    minimums = sorted(factors)
    values = np.array([1.0, *(factors[m] for m in minimums)])
    factor = values[np.searchsorted(np.array(minimums), lengths, side="right")]
    whole = np.floor(factor)
    extra = np.random.Generator(np.random.PCG64(seed)).random(len(lengths)) < factor - whole
    chosen = np.repeat(np.arange(len(lengths)), (whole + extra).astype(np.int64))
    if len(chosen) == 0:
        raise HydraError(f"{name}: upsample {factors} leaves no document")
    return chosen
