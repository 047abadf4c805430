"""The part of one layer on one tensor-parallel rank: heads, parameters and their rows.

This module computes all uneven parts of a head partition, once, on the host: the rank's heads, the KV groups
that only this rank reads, the KV groups that several ranks read, the number of rows, and the padding that gives
every rank's parameters the same shape. :mod:`.parameters` lists the parameters of a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.model.local_parameters import LocalParameter
from megatron_hydra.model.parameters import (
    HOLDERS,
    INPUT,
    INPUT_BIAS,
    OUTPUT,
    Axis,
    HeadParameter,
    Holder,
    parameters_of,
    sizes,
)
from megatron_hydra.parallel.head_partition import LayerPartition, shared_groups
from megatron_hydra.parallel.head_weights import Segment, padded_rows, total_rows

_Places = dict[Axis, tuple[tuple[int, ...], int]]
"""First axis -> the places along it that a parameter has, and the axis' length."""


class _Branch:
    """KV bookkeeping of one branch (FA or GDN, or both at once) of one layer over all ranks.

    A *kv id* is the source of a query head's k and v: its KV group, or the head itself if every head has its
    own (multi-head GDN).

    Args:
        heads_by_rank: the heads of each rank.
        kv_of: kv id of every head.
        everywhere: kv ids that every rank reads, whatever its heads are.
    """

    def __init__(
        self,
        heads_by_rank: Sequence[Sequence[int]],
        kv_of: dict[int, int],
        everywhere: Collection[int] = (),
    ) -> None:
        self.heads_by_rank, self.kv_of = heads_by_rank, kv_of
        self.heads = sorted({head for heads in heads_by_rank for head in heads})
        self.kv = sorted({kv_of[head] for head in self.heads} | set(everywhere))
        self.shared = tuple(sorted({*shared_groups(heads_by_rank, kv_of), *everywhere}))

    def own_kv(self, rank: int) -> tuple[int, ...]:
        """Kv ids that only this rank reads, ascending."""
        read = {self.kv_of[head] for head in self.heads_by_rank[rank]}
        return tuple(sorted(read - set(self.shared)))

    def shared_used(self, rank: int) -> tuple[int, ...]:
        """Places in ``shared`` of the kv ids that this rank reads."""
        read = {self.kv_of[head] for head in self.heads_by_rank[rank]}
        return tuple(i for i, kv in enumerate(self.shared) if kv in read)

    def local_kv(self, rank: int) -> tuple[int, ...]:
        """Kv ids that this rank's heads read: first those that only this rank reads, then shared ones."""
        return (*self.own_kv(rank), *(self.shared[i] for i in self.shared_used(rank)))

    def kv_of_heads(self, rank: int) -> tuple[int, ...]:
        """For each of the rank's heads, the place of its kv id in the local ones."""
        local = self.local_kv(rank)
        return tuple(local.index(self.kv_of[head]) for head in self.heads_by_rank[rank])

    def place(self, heads: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """Places of heads in the layer's canonical tensors of this branch, and their number."""
        return tuple(self.heads.index(head) for head in heads), len(self.heads)

    def place_kv(self, kv: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """Places of kv ids in the layer's canonical k and v tensors of this branch, and their number."""
        return tuple(self.kv.index(i) for i in kv), len(self.kv)


class LocalHeads:
    """One rank's part of one layer. Only this rank has the ``sharded`` heads. Every rank has the
    ``replicated_fa`` heads and computes them on its slice of the sequence (FA partition ``sequence``).

    Attributes:
        layer: 0-based global layer index.
        fa, gdn: original indices of the sharded FA and GDN heads of this rank; equal if every head is both
            (``hydra.mixer``).
        sharded: the heads of this rank's output projection, in the order of the joined outputs: ``fa + gdn``,
            or ``fa`` if every head is both.
        replicated_fa: FA heads that every rank has.
        tied: whether FA and GDN heads of a KV group read the same k and v projections (``hydra.qkv``).
        *_padded: sizes after padding to the largest rank (and the input projection's to a multiple).
    """

    def __init__(self, model: ModelConfig, partition: LayerPartition, rank: int) -> None:
        self.model, self.rank, self.layer = model, rank, partition.layer
        by_sequence = partition.mode == "sequence"
        nothing: tuple[tuple[int, ...], ...] = ((),) * partition.tp_size
        group_of = {head: model.kv_group(head) for head in range(model.num_query_heads)}
        self._fa = _Branch(nothing if by_sequence else partition.fa, group_of)
        self._replicated = _Branch(((*partition.fa[0],),) if by_sequence else ((),), group_of)
        self._multi_head = model.switches.gdn_kv == "mha"
        own = {head: head for head in range(model.num_query_heads)}
        self._gdn = _Branch(partition.gdn, own if self._multi_head else group_of)
        self.tied = model.switches.ties_qkv
        # Which branches have their own k and v projections; if tied, one projection serves both. FA heads that
        # every rank has read its slice of the sequence, GDN heads the whole sequence: their groups are
        # projected by slices, which are gathered for GDN.
        self._projected = [("fa.", self._fa), ("gdn.", self._gdn)]
        if self.tied:
            everyone = [
                (*fa, *gdn) for fa, gdn in zip(self._fa.heads_by_rank, partition.gdn, strict=True)
            ]
            self._both = _Branch(everyone, group_of, everywhere=self._replicated.kv)
            self._projected = [("", self._both)]

        self.fa, self.gdn = self._fa.heads_by_rank[rank], partition.gdn[rank]
        self.mixed = model.switches.mixes_in_every_head
        self.sharded = self._sharded_of(rank)
        self.replicated_fa = self._replicated.heads_by_rank[0]
        self.layer_has_fa = bool(self._fa.heads or self._replicated.heads)
        self.layer_has_gdn = bool(self._gdn.heads)
        self.num_fa_here = len(self.fa) + len(self.replicated_fa)

        self._ranks = range(partition.tp_size)

    # -- kv heads -----------------------------------------------------------------------------

    @property
    def fa_kv_of_heads(self) -> tuple[int, ...]:
        """For each FA head computed here, its KV head's place in the local ones."""
        if self.replicated_fa:
            return self._replicated.kv_of_heads(0)
        return self._fa.kv_of_heads(self.rank)

    @property
    def gdn_kv_of_heads(self) -> tuple[int, ...]:
        """For each GDN head of this rank, the place of its k and v in the local ones."""
        return self._gdn.kv_of_heads(self.rank)

    @property
    def gdn_shared_kv(self) -> tuple[int, ...]:
        """Which of the layer's shared GDN KV groups this rank reads."""
        return self._gdn.shared_used(self.rank)

    @property
    def num_gdn_shared_kv(self) -> int:
        """Number of KV groups of GDN heads that several ranks read."""
        return len(self._gdn.shared)

    @property
    def needs_slice(self) -> bool:
        """Whether some heads are computed on this rank's slice of the sequence."""
        gated = self.model.switches.fusion == "gated"
        return bool(self.replicated_fa or self.shared_kv_segments or gated)

    # -- parameters ---------------------------------------------------------------------------

    @functools.cached_property
    def parameters(self) -> tuple[LocalParameter, ...]:
        """Every parameter of the layer's attention on this rank."""
        held: dict[Holder, list[HeadParameter]] = {holder: [] for holder in HOLDERS}
        for row in parameters_of(self.model, self.layer_has_fa, self.layer_has_gdn):
            held.setdefault(row.holder or Holder(row.key, row.key), []).append(row)
        found = []
        for holder, rows in held.items():
            if rows and not rows[0].axis:
                shape = rows[0].shape(self.model, 0)
                found.append(_local(holder.own, holder, shape, None, 0, False, rows[0]))
            elif rows:
                found += self._held(
                    holder, sorted(rows, key=lambda row: _LOCAL_ORDER.index(row.branch))
                )
        return tuple(found)

    def _held(self, holder: Holder, rows: Sequence[HeadParameter]) -> Iterator[LocalParameter]:
        """Parameters with rows of these canonical tensors; without those that have no rows on any rank."""
        tail = rows[0].tail
        assert all({*row.tail, "d"} == {*tail, "d"} for row in rows), holder
        axis = tail.index("d") if "d" in tail else 0
        columns = sizes(self.model, tuple(size for size in tail if size != "d"))
        for name, places in (
            (holder.own, self._own(self.rank)),
            (holder.replicated, self._everywhere()),
            (holder.shared, self._shared()),
        ):
            sharded = name == holder.own
            segments = self._segments(holder, rows, places)
            padded = total_rows(segments)
            if sharded:
                of_rank = [self._segments(holder, rows, self._own(rank)) for rank in self._ranks]
                padded = max(map(padded_rows if holder == INPUT else total_rows, of_rank))
            if name and padded:
                shape = (*columns[:axis], padded, *columns[axis:])
                yield _local(name, holder, shape, segments, axis, sharded, rows[0])

    def _segments(
        self, holder: Holder, rows: Sequence[HeadParameter], places: _Places
    ) -> tuple[Segment, ...]:
        segments = []
        for row in rows:
            slots, total = places.get(row.axis, ((), 0))
            key = row.key.removeprefix(holder.prefix).removeprefix(".")
            size = self.model.head_dim if "d" in row.tail else 0
            if slots:
                segments.append(Segment(key, slots, total, size))
        return tuple(segments)

    def _own(self, rank: int) -> _Places:
        """Rows that only ``rank`` has."""
        places: _Places = {
            "fa": self._fa.place(self._fa.heads_by_rank[rank]),
            "gdn": self._gdn.place(self._gdn.heads_by_rank[rank]),
            "head": (self._sharded_of(rank), self.model.num_query_heads),
        }
        return places | {a: b.place_kv(b.own_kv(rank)) for a, b in self._kv_branches.items()}

    def _everywhere(self) -> _Places:
        """Rows of FA heads that every rank has, and of their KV groups if FA has its own projections."""
        branch, heads = self._replicated, tuple(self.replicated_fa)
        return {
            "fa": branch.place(heads),
            "fa_kv": branch.place_kv(branch.own_kv(0)),
            "head": (heads, self.model.num_query_heads),
        }

    def _shared(self) -> _Places:
        """KV groups that several ranks read."""
        return {axis: branch.place_kv(branch.shared) for axis, branch in self._kv_branches.items()}

    @property
    def _kv_branches(self) -> dict[Axis, _Branch]:
        branches: dict[Axis, _Branch] = {"fa_kv": self._fa, "gdn_kv": self._gdn}
        if self.tied:
            branches["kv"] = self._both
        return branches

    def _sharded_of(self, rank: int) -> tuple[int, ...]:
        fa, gdn = self._fa.heads_by_rank[rank], self._gdn.heads_by_rank[rank]
        return (*fa,) if self.mixed else (*fa, *gdn)

    def parameter(self, name: str) -> LocalParameter | None:
        """The parameter of this name, or ``None`` if no rank has rows of it."""
        return next((p for p in self.parameters if p.name == name), None)

    def segments(self, name: str) -> tuple[Segment, ...]:
        """This rank's rows of a parameter, without padding."""
        parameter = self.parameter(name)
        return () if parameter is None or parameter.segments is None else parameter.segments

    @property
    def in_segments(self) -> tuple[Segment, ...]:
        """Rows of the column-parallel input projection."""
        return self.segments(INPUT.own)

    @property
    def in_rows_padded(self) -> int:
        """Its rows with padding, equal on all ranks."""
        return self._rows(INPUT.own)

    @property
    def in_bias_segments(self) -> tuple[Segment, ...]:
        """Entries of its bias: of q, k and v, and of the FA gate."""
        return self.segments(INPUT_BIAS.own)

    @property
    def in_bias_padded(self) -> int:
        """Entries of its bias with padding."""
        return self._rows(INPUT_BIAS.own)

    @property
    def fa_in_segments(self) -> tuple[Segment, ...]:
        """Rows of the replicated FA input projection."""
        return self.segments(INPUT.replicated)

    @property
    def fa_bias_segments(self) -> tuple[Segment, ...]:
        """Entries of its bias."""
        return self.segments(INPUT_BIAS.replicated)

    @property
    def shared_kv_segments(self) -> tuple[Segment, ...]:
        """Rows of the projection of KV groups that several ranks read."""
        return self.segments(INPUT.shared)

    @property
    def num_sharded_padded(self) -> int:
        """Heads of the row-parallel output projection, with padding."""
        return self._rows(OUTPUT.own) // self.model.head_dim

    def _rows(self, name: str) -> int:
        parameter = self.parameter(name)
        return 0 if parameter is None else parameter.rows

    # -- k and v that several readers share ---------------------------------------------------

    @property
    def shared_kv_used(self) -> dict[str, tuple[int, ...]]:
        """Canonical key -> shared KV groups that this rank reads over the whole sequence."""
        used = {}
        for prefix, branch in self._projected:
            places = branch.shared_used(self.rank)
            if places:
                used[f"{prefix}k"] = used[f"{prefix}v"] = places
        return used

    @functools.cached_property
    def gathers_shared_kv(self) -> bool:
        """Whether some rank reads a shared KV group over the whole sequence.

        ``False`` if all its readers work on slices: FA heads that every rank has, with tied k and v.
        """
        ranks = range(len(self._gdn.heads_by_rank))
        return any(branch.shared_used(rank) for _, branch in self._projected for rank in ranks)

    @functools.cached_property
    def tied_kv_places(self) -> dict[str, tuple[int, ...]]:
        """The places of each branch's KV heads in the tied k and v of this rank.

        For the whole sequence, the tied k and v have the groups that only this rank reads, then the shared ones
        that it uses. For FA heads that every rank has, they have all shared groups, over its slice. The order
        is that of :attr:`fa_kv_of_heads` and :attr:`gdn_kv_of_heads`.
        """
        assert self.tied
        local, places = self._both.local_kv(self.rank), {}
        if self.replicated_fa:
            groups = self._replicated.local_kv(0)
            places["fa"] = tuple(self._both.shared.index(group) for group in groups)
        elif self.fa:
            places["fa"] = tuple(local.index(group) for group in self._fa.local_kv(self.rank))
        if self.gdn:
            ids = self._gdn.local_kv(self.rank)
            groups = tuple(map(self.model.kv_group, ids)) if self._multi_head else ids
            places["gdn"] = tuple(local.index(group) for group in groups)
        return places


_LOCAL_ORDER = ("fa", "", "gdn")
"""Rows of a holder by branch."""


def _local(
    name: str,
    holder: Holder,
    shape: tuple[int, ...],
    segments: tuple[Segment, ...] | None,
    axis: int,
    sharded: bool,
    row: HeadParameter,
) -> LocalParameter:
    return LocalParameter(
        name, holder.prefix, shape, segments, axis, sharded, row.like_norm, row.fp32, row.decays
    )
