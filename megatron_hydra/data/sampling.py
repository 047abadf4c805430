"""Order of samples: seeded permutations and blends in O(1) memory.

Arithmetic maps a position to an item; no table per document or per sample is stored. So a stream of any length
opens at once, and any step can be read directly.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from megatron_hydra.errors import HydraError

_MASK64 = (1 << 64) - 1
_ROUNDS = 6
_BLEND_PERIOD = 1 << 16


def mix64(value: int) -> int:
    """A bijective 64-bit finaliser (splitmix64), the random function used below."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def mix64_of(values: np.ndarray) -> np.ndarray:
    """:func:`mix64` of every entry of a uint64 array."""
    values = values + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around without a warning
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from integers and strings; the same on every machine and Python."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Permutation:
    """A seeded bijection of ``0 … size−1`` without a table (Feistel network, cycle walking).

    The network permutes the range up to the next power of four. A value outside ``0 … size−1`` goes through
    the network again, at most four times on average.
    """

    def __init__(self, size: int, key: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got {size}")
        self.size = size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_bits = half_bits
        self._half_mask = (1 << half_bits) - 1
        self._keys = [mix64(key ^ mix64(i)) for i in range(_ROUNDS)]

    def __call__(self, position: int) -> int:
        """The element at ``position``.

        Raises:
            IndexError: ``position`` is outside ``0 … size−1``.
        """
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is outside 0..{self.size - 1}")
        value = self._network(position)
        while value >= self.size:
            value = self._network(value)
        return value

    def of(self, positions: np.ndarray) -> np.ndarray:
        """The elements at many positions, int64; equal to a call for each position.

        Raises:
            IndexError: a position is outside ``0 … size−1``.
        """
        if len(positions) and not (positions.min() >= 0 and positions.max() < self.size):
            raise IndexError(f"a position is outside 0..{self.size - 1}")
        values = self._network_of(positions.astype(np.uint64))
        while len(outside := np.flatnonzero(values >= np.uint64(self.size))):
            values[outside] = self._network_of(values[outside])
        return values.astype(np.int64)

    def _network_of(self, values: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self._half_bits), np.uint64(self._half_mask)
        left, right = values >> half, values & mask
        for key in self._keys:
            left, right = right, left ^ (mix64_of(np.uint64(key) ^ right) & mask)
        return (left << half) | right

    def _network(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (mix64(key ^ right) & self._half_mask)
        return (left << self._half_bits) | right


@dataclasses.dataclass(frozen=True)
class Draw:
    """One element of a blend: the ``index``-th sample drawn from part ``source``."""

    source: int
    index: int


class Blend:
    """Assigns global sample numbers to the parts of a blend in proportion to their weights.

    A table of one period (65,536 samples) contains every part in proportion to its weight, evenly
    interleaved. Sample n uses entry ``n mod period``. In any prefix of the stream, the number of samples of a
    part therefore differs by at most one from its exact share (up to the table's resolution of 1/65,536).
    """

    def __init__(self, weights: list[float], names: list[str]) -> None:
        if not weights:
            raise HydraError("data.blend is empty: list at least one source")
        for weight, name in zip(weights, names, strict=True):
            if not weight > 0 or not np.isfinite(weight):
                raise HydraError(
                    f"data.blend: {name} has weight {weight}; weights must be above 0 "
                    "(remove a source instead of giving it weight 0)"
                )
        self.counts = self._apportion(np.asarray(weights, dtype=np.float64), names)
        times = np.concatenate([(np.arange(c) + 0.5) / c for c in self.counts])
        owners = np.repeat(np.arange(len(weights)), self.counts)
        ranks = np.concatenate([np.arange(c) for c in self.counts])
        order = np.lexsort((owners, times))
        self._owner = owners[order].astype(np.int32)
        self._rank = ranks[order].astype(np.int32)
        self.period = len(self._owner)

    @staticmethod
    def _apportion(weights: np.ndarray, names: list[str]) -> np.ndarray:
        """Integer counts of one period (largest remainder)."""
        if len(weights) == 1:
            return np.array([1])
        exact = weights / weights.sum() * _BLEND_PERIOD
        counts = np.floor(exact).astype(np.int64)
        missing = _BLEND_PERIOD - int(counts.sum())
        counts[np.argsort(-(exact - counts), kind="stable")[:missing]] += 1
        if (counts == 0).any():
            name = names[int(np.argmin(counts))]
            raise HydraError(
                f"data.blend: the weight of {name} is below 1/{_BLEND_PERIOD} of the blend; raise "
                "it or remove the source"
            )
        return counts

    def draw(self, sample: int) -> Draw:
        """The part of global sample number ``sample``, and the index within the part."""
        cycle, position = divmod(sample, self.period)
        source = int(self._owner[position])
        return Draw(source, cycle * int(self.counts[source]) + int(self._rank[position]))

    def drawn_before(self, sample: int) -> list[int]:
        """Number of samples of each part before global sample number ``sample``."""
        cycle, position = divmod(sample, self.period)
        inside = np.bincount(self._owner[:position], minlength=len(self.counts))
        return [int(cycle * c + i) for c, i in zip(self.counts, inside, strict=True)]
