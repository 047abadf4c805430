"""Assign heads to tensor-parallel ranks (design §6).

The assignment depends only on the head map and the tensor-parallel size, not on a process group or device.
There are two modes for full-attention heads:

``heads``
    The numbers of FA heads on ranks differ by at most one. Heads of a KV group stay on one rank if these
        numbers allow it. GDN heads fill every rank up to its share of all heads.
``sequence``
    Every rank holds all FA heads and computes them for its slice of the sequence. GDN heads are distributed
        evenly. FA work is then equal on all ranks for any map.

If every head is both FA and GDN (``hydra.mixer``), heads are assigned once, and a rank runs both kinds for its
heads.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.errors import HydraError

FullAttentionPartition = Literal["heads", "sequence"]


@dataclasses.dataclass(frozen=True)
class LayerPartition:
    """The heads of one layer, by rank. All indices are original (global) head indices.

    Attributes:
        layer: 0-based global layer index.
        mode: mode for FA heads.
        fa: for each rank its FA heads, ascending (``sequence``: all FA heads on every rank).
        gdn: for each rank its GDN heads, ascending.
    """

    layer: int
    mode: FullAttentionPartition
    fa: tuple[tuple[int, ...], ...]
    gdn: tuple[tuple[int, ...], ...]

    @property
    def tp_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return len(self.gdn)

    def full_attention_share(self) -> tuple[float, ...]:
        """FA work of each rank, in heads: whole heads, or all heads over 1/TP of the sequence."""
        if self.mode == "sequence":
            return tuple(len(heads) / self.tp_size for heads in self.fa)
        return tuple(float(len(heads)) for heads in self.fa)

    def full_attention_imbalance(self) -> float:
        """Largest FA work of a rank divided by the mean; 1 if the layer has no FA head."""
        share = self.full_attention_share()
        mean = sum(share) / len(share)
        return max(share) / mean if mean else 1.0


def shared_groups(
    per_rank_heads: Sequence[Sequence[int]], group_of: dict[int, int]
) -> tuple[int, ...]:
    """KV groups that heads of more than one rank read, ascending."""
    readers: dict[int, set[int]] = defaultdict(set)
    for rank, heads in enumerate(per_rank_heads):
        for head in heads:
            readers[group_of[head]].add(rank)
    return tuple(sorted(group for group, ranks in readers.items() if len(ranks) > 1))


def plan_layer(
    layer: int,
    fa_heads: Sequence[int],
    num_query_heads: int,
    num_kv_heads: int,
    tp_size: int,
    mode: FullAttentionPartition,
) -> LayerPartition:
    """Assign the heads of one layer.

    Args:
        layer: 0-based index, for messages.
        fa_heads: original indices of the layer's FA heads.
        num_query_heads, num_kv_heads: H and G.
        tp_size: number of ranks.
        mode: see the module.

    Raises:
        HydraError: the layer has fewer heads than ranks; names the layer.
    """
    if tp_size > num_query_heads:
        raise HydraError(
            f"layer {layer}: {num_query_heads} query heads cannot be distributed over "
            f"parallel.tensor={tp_size} ranks: every rank needs at least one head"
        )
    group = num_query_heads // num_kv_heads
    fa_heads = sorted(fa_heads)
    gdn_heads = [h for h in range(num_query_heads) if h not in set(fa_heads)]
    if mode == "sequence":
        fa = [list(fa_heads) for _ in range(tp_size)]
        quotas = _split_evenly(len(gdn_heads), tp_size)
    else:
        fa = _assign_groups(fa_heads, group, _split_evenly(len(fa_heads), tp_size))
        totals = _split_evenly(num_query_heads, tp_size)
        quotas = [total - len(heads) for total, heads in zip(totals, fa, strict=True)]
    gdn = _assign_groups(gdn_heads, group, quotas)
    return LayerPartition(
        layer=layer, mode=mode, fa=tuple(map(tuple, fa)), gdn=tuple(map(tuple, gdn))
    )


def plan_model(
    model: ModelConfig, tp_size: int, mode: FullAttentionPartition
) -> tuple[LayerPartition, ...]:
    """The partition of every layer. A dense model, or a single rank, always uses the mode ``heads``.

    Raises:
        HydraError: a layer cannot be partitioned, or the model does not support ``sequence``.
    """
    mode = mode if model.is_hybrid and tp_size > 1 else "heads"
    model.check_fa_partition(mode)
    planned = tuple(
        plan_layer(
            layer, model.fa_heads(layer), model.num_query_heads, model.num_kv_heads, tp_size, mode
        )
        for layer in range(model.num_layers)
    )
    if not model.switches.mixes_in_every_head:
        return planned
    return tuple(dataclasses.replace(p, gdn=p.fa) for p in planned)


def _split_evenly(count: int, ranks: int) -> list[int]:
    """``count`` split into ``ranks`` numbers that differ by at most one, larger ones first."""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


def _assign_groups(heads: Sequence[int], group_size: int, quotas: list[int]) -> list[list[int]]:
    """Fill ranks up to their quotas by best fit, to split few KV groups.

    Whole groups, largest first, go to the rank with the least sufficient room. If no rank has enough room, the
    group is split over the ranks with the most room.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for head in heads:
        groups[head // group_size].append(head)
    room = list(quotas)
    dealt: list[list[int]] = [[] for _ in quotas]
    for _, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        rest = list(members)
        while rest:
            fitting = [r for r in range(len(room)) if room[r] >= len(rest)]
            if fitting:
                rank = min(fitting, key=lambda r: (room[r], r))
            else:
                rank = max(range(len(room)), key=lambda r: (room[r], -r))
            take = min(room[rank], len(rest))
            dealt[rank] += rest[:take]
            room[rank] -= take
            rest = rest[take:]
    return [sorted(heads) for heads in dealt]
