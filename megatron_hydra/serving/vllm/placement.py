"""The tensor-parallel rank of each head.

vLLM needs the same caches on every rank, and one number of KV heads for all attention layers. So the unit of
full attention is a KV group: each group with FA heads is a separate vLLM attention with one KV head, and is
never split. In a layer, every rank has room for equally many groups. GDN heads are then distributed so that all
ranks have nearly equally many heads. A rank may have any number of them and reserves memory for the largest.

Training differs (``parallel.head_partition``): no cache is shared there, and groups may be split.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class LocalHeads:
    """One rank's heads of one layer, as original head indices.

    Attributes:
        fa_groups: the FA heads of each KV group; groups and heads are ascending.
        gdn: GDN heads, ascending.
    """

    fa_groups: tuple[tuple[int, ...], ...]
    gdn: tuple[int, ...]

    @property
    def fa(self) -> tuple[int, ...]:
        """FA heads, ascending."""
        return tuple(head for group in self.fa_groups for head in group)


Placement = tuple[tuple[LocalHeads, ...], ...]
"""``[layer][rank]``."""


def place_heads(
    full_attention_heads: Sequence[Sequence[int]],
    num_heads: int,
    num_kv_heads: int,
    tp_size: int,
) -> Placement:
    """Place the heads of all layers.

    Among ranks with room, a group goes to the rank with the fewest FA heads in this layer; if several have, to
    the one with the fewest in all layers so far. KV groups are few and uneven, so a single layer cannot be
    balanced, but the model nearly can.

    Args:
        full_attention_heads: FA heads of every layer.
        num_heads, num_kv_heads: H and G.
        tp_size: number of ranks.
    """
    per_group = num_heads // num_kv_heads
    so_far = [0] * tp_size
    placement = []
    for fa_heads in full_attention_heads:
        groups: dict[int, list[int]] = defaultdict(list)
        for head in sorted(fa_heads):
            groups[head // per_group].append(head)
        room = -(-len(groups) // tp_size)
        fa: list[list[tuple[int, ...]]] = [[] for _ in range(tp_size)]
        counts = [0] * tp_size
        for _, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
            free = [r for r in range(tp_size) if len(fa[r]) < room]
            rank = min(free, key=lambda r: (counts[r], so_far[r], r))
            fa[rank].append(tuple(members))
            counts[rank] += len(members)
            so_far[rank] += len(members)
        gdn = _fill([h for h in range(num_heads) if h not in set(fa_heads)], counts)
        placement.append(
            tuple(
                LocalHeads(fa_groups=tuple(sorted(fa[rank])), gdn=tuple(gdn[rank]))
                for rank in range(tp_size)
            )
        )
    return tuple(placement)


def _fill(heads: list[int], taken: list[int]) -> list[list[int]]:
    """Distribute ``heads`` as evenly as ``taken`` allows; neighbouring heads stay together."""
    counts = list(taken)
    for _ in heads:
        counts[min(range(len(counts)), key=lambda r: (counts[r], r))] += 1
    dealt, start = [], 0
    for before, after in zip(taken, counts, strict=True):
        dealt.append(heads[start : start + after - before])
        start += after - before
    return dealt
