"""Layout of a packed stream: documents, positions and shards.

A micro-batch is one stream of T tokens with several documents one after the other. :class:`PackedSequence` has
the document boundaries as *host* integers. From these it derives the data that each branch of a layer needs,
once per micro-batch and without a device synchronisation: positions from the document's start, the document
fragments of this rank's context-parallel shard, and for any block of queries the keys that it may see.
``GPTModel`` passes it to its layers as ``packed_seq_params``.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_hydra.errors import HydraError
from megatron_hydra.parallel import platform


@dataclasses.dataclass(frozen=True)
class AttentionBlock:
    """A contiguous block of queries and the keys that they may see, both in stream coordinates.

    Segment i has queries ``cu_q[i]:cu_q[i+1]`` of the block and keys ``cu_k[i]:cu_k[i+1]`` of the
    key range; its last query is aligned with its last key (bottom-right causal mask).

    Attributes:
        q_start, q_end: the queries, global positions in the stream.
        k_start, k_end: the keys, global positions in the stream; ``k_end == q_end``.
        cu_q, cu_k: segment boundaries relative to ``q_start`` and ``k_start``.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]


class PackedSequence(PackedSeqParams):
    """The layout of one packed stream, seen from one context-parallel rank.

    Attributes:
        cu_seqlens: document boundaries in the global stream, ``0 … T_global``.
        length_global, length_local: tokens in the stream, and in this rank's shard.
        shard_start: global index of the shard's first token.
        cp_rank, cp_size: index of this shard, and number of contiguous shards of the stream.
        local_cu_seqlens: boundaries of the document *fragments* inside the shard, ``0 … T_local``.
        positions_local: ``[T_local]`` int64, each token's position from its document's start.
    """

    def __init__(
        self,
        cu_seqlens: tuple[int, ...],
        *,
        cp_rank: int = 0,
        cp_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(qkv_format="thd")
        self.cu_seqlens = tuple(int(c) for c in cu_seqlens)
        self.length_global = self.cu_seqlens[-1]
        if self.length_global % cp_size:
            raise HydraError(
                f"a packed stream of {self.length_global} tokens cannot be cut into {cp_size} "
                "context-parallel shards of equal length: make data.sequence_length a multiple of "
                "parallel.context"
            )
        self.cp_rank, self.cp_size = cp_rank, cp_size
        self.length_local = self.length_global // cp_size
        self.shard_start = cp_rank * self.length_local
        self.device = torch.device(device)

        start, end = self.shard_start, self.shard_start + self.length_local
        self.local_cu_seqlens = self.attention_block(start, end).cu_q
        self.positions_local = self._positions(start, end)
        self._cache: dict[Hashable, Any] = {}

    @classmethod
    def from_batch(
        cls, cu_seqlens: tuple[int, ...], cp_rank: int, cp_size: int, device: torch.device | str
    ) -> PackedSequence:
        """Make the layout of a :class:`~megatron_hydra.data.batch.PackedBatch` on one rank."""
        return cls(cu_seqlens, cp_rank=cp_rank, cp_size=cp_size, device=device)

    def attention_block(self, start: int, end: int, window: int | None = None) -> AttentionBlock:
        """The keys that the queries ``start:end`` (global) may see, document by document.

        Args:
            start, end: global positions in the stream.
            window: number of keys that a query sees, its own included; ``None``: all of its document so far.
        """
        cu = self.cu_seqlens
        first = bisect.bisect_right(cu, start) - 1
        k_start = cu[first] if window is None else max(cu[first], start - window + 1)
        inner = cu[first + 1 : bisect.bisect_left(cu, end)]
        bounds = (start, *inner, end)
        return AttentionBlock(
            q_start=start,
            q_end=end,
            k_start=k_start,
            k_end=end,
            cu_q=tuple(b - start for b in bounds),
            cu_k=(0, *(b - k_start for b in bounds[1:])),
        )

    def _positions(self, start: int, end: int) -> torch.Tensor:
        block = self.attention_block(start, end)
        index = torch.arange(block.k_start, end)
        lengths = torch.tensor([b - a for a, b in zip(block.cu_k, block.cu_k[1:], strict=False)])
        starts = torch.tensor(block.cu_k[:-1]) + block.k_start
        positions = index - torch.repeat_interleave(starts, lengths)
        return platform.to_device(positions[start - block.k_start :], self.device)

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Call ``compute()`` once per stream, so that layers share tables, indices and masks."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def log_scale(
        self, a: float, positions: torch.Tensor, window: int | None = None
    ) -> torch.Tensor:
        """s_t = ln(t + a) / ln(a) for given positions ``[T]``; fp32 ``[T]`` (design §2).

        The scale compensates for the number of keys. A ``window`` limits this number, so t is at most window −
        1.
        """
        positions = positions if window is None else positions.clamp(max=window - 1)
        return (torch.log(positions.double() + a) / math.log(a)).float()
