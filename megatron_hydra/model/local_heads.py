"""What one tensor-parallel rank holds of one layer: heads, and the rows of its fused weights.

Everything that is uneven about a head partition is worked out here, once, on the host: which heads,
which KV groups are this rank's alone and which several ranks read, how many rows that makes, and how
far to pad so that every rank's parameters have the same shape.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.parallel.head_partition import LayerPartition, shared_groups
from megatron_hydra.parallel.head_weights import Segment, padded_rows, total_rows


class _Branch:
    """KV bookkeeping of one branch (FA or GDN, or both at once) of one layer over all ranks.

    A *kv id* is what a query head reads its k and v from: its KV group, or, where every head has its
    own (multi-head GDN), the head itself.

    Args:
        heads_by_rank: the heads of each rank.
        kv_of: kv id of every head.
        everywhere: kv ids that every rank reads, whatever its own heads are.
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
        """Kv ids that this rank's heads read: own ones first, then shared ones."""
        return (*self.own_kv(rank), *(self.shared[i] for i in self.shared_used(rank)))

    def kv_of_heads(self, rank: int) -> tuple[int, ...]:
        """For each of the rank's heads the place of its kv id among the local ones."""
        local = self.local_kv(rank)
        return tuple(local.index(self.kv_of[head]) for head in self.heads_by_rank[rank])

    def head_slots(self, heads: Sequence[int]) -> tuple[int, ...]:
        """Places of heads in the layer's canonical tensors of this branch."""
        return tuple(self.heads.index(head) for head in heads)

    def kv_slots(self, kv: Sequence[int]) -> tuple[int, ...]:
        """Places of kv ids in the layer's canonical k and v tensors of this branch."""
        return tuple(self.kv.index(i) for i in kv)


class LocalHeads:
    """One rank's part of one layer. ``sharded`` heads are this rank's alone; ``replicated_fa`` heads
    are on every rank and work on slices of the sequence (FA partition ``sequence``).

    Attributes:
        fa, gdn: original indices of the sharded FA and GDN heads of this rank; the same ones where
            every head is both (``hydra.mixer``).
        sharded: the heads of this rank's output projection, in the order in which outputs are
            joined: ``fa + gdn``, or ``fa`` where every head is both.
        replicated_fa: FA heads held by every rank.
        tied: FA and GDN heads of a KV group read the same k and v projections (``hydra.qkv``).
        *_padded: sizes after padding to the largest rank (and the input projection's to a multiple).
    """

    def __init__(self, model: ModelConfig, partition: LayerPartition, rank: int) -> None:
        self.model, self.rank = model, rank
        by_sequence = partition.mode == "sequence"
        nothing: tuple[tuple[int, ...], ...] = ((),) * partition.tp_size
        group_of = {head: model.kv_group(head) for head in range(model.num_query_heads)}
        self._fa = _Branch(nothing if by_sequence else partition.fa, group_of)
        self._replicated = _Branch(((*partition.fa[0],),) if by_sequence else ((),), group_of)
        self._multi_head = model.switches.gdn_kv == "mha"
        own = {head: head for head in range(model.num_query_heads)}
        self._gdn = _Branch(partition.gdn, own if self._multi_head else group_of)
        self.tied = model.switches.ties_qkv
        # Which branches project k and v for themselves; tied, one projection serves both. FA heads that
        # every rank holds read its slice of the sequence, GDN heads the whole of it: their groups are
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
        self.sharded = self.fa if self.mixed else (*self.fa, *self.gdn)
        self.replicated_fa = self._replicated.heads_by_rank[0]
        self.layer_has_fa = bool(self._fa.heads or self._replicated.heads)
        self.layer_has_gdn = bool(self._gdn.heads)
        self.num_fa_here = len(self.fa) + len(self.replicated_fa)

        ranks = range(partition.tp_size)
        self.num_outputs_padded = max(
            len(self._fa.heads_by_rank[r]) + len(partition.gdn[r]) for r in ranks
        )
        self.num_sharded_padded = self.num_outputs_padded // (2 if self.mixed else 1)
        self.num_gdn_padded = max(len(heads) for heads in partition.gdn)
        self.in_rows_padded = max(padded_rows(self._in_segments(r)) for r in ranks)
        self.in_bias_padded = max(total_rows(self._bias_segments(r)) for r in ranks)
        self.num_conv_padded = max(
            len(partition.gdn[r]) + 2 * len(self._gdn.own_kv(r)) for r in ranks
        )

    # -- kv heads -----------------------------------------------------------------------------

    @property
    def fa_kv_of_heads(self) -> tuple[int, ...]:
        """For each FA head computed here, its KV head among the local ones."""
        if self.replicated_fa:
            return self._replicated.kv_of_heads(0)
        return self._fa.kv_of_heads(self.rank)

    @property
    def gdn_kv_of_heads(self) -> tuple[int, ...]:
        """For each GDN head of this rank, its k and v among the local ones."""
        return self._gdn.kv_of_heads(self.rank)

    @property
    def gdn_shared_kv(self) -> tuple[int, ...]:
        """Which of the layer's shared GDN KV groups this rank reads."""
        return self._gdn.shared_used(self.rank)

    @property
    def num_gdn_shared_kv(self) -> int:
        """How many KV groups of GDN heads several ranks read."""
        return len(self._gdn.shared)

    @property
    def needs_slice(self) -> bool:
        """Whether something is computed on this rank's slice of the sequence."""
        gated = self.model.switches.fusion == "gated"
        return bool(self.replicated_fa or self.shared_kv_segments or gated)

    # -- rows of the fused weights ------------------------------------------------------------

    @property
    def in_segments(self) -> tuple[Segment, ...]:
        """Rows of the column-parallel input projection."""
        return self._in_segments(self.rank)

    @property
    def in_bias_segments(self) -> tuple[Segment, ...]:
        """Entries of its bias: of q, k and v, and of the FA gate."""
        return self._bias_segments(self.rank)

    @property
    def fa_in_segments(self) -> tuple[Segment, ...]:
        """Rows of the replicated FA input projection."""
        heads = self.replicated_fa
        return self._fa_segments(self._replicated, heads, self._replicated.own_kv(0))

    @property
    def fa_bias_segments(self) -> tuple[Segment, ...]:
        """Entries of its bias."""
        return self._with_bias(self.fa_in_segments)

    @property
    def shared_kv_segments(self) -> tuple[Segment, ...]:
        """Rows of the projection of KV groups that several ranks read."""
        segments: list[Segment] = []
        for prefix, branch in self._projected:
            segments += self._kv_segments(prefix, branch, branch.shared)
        return tuple(segments)

    @property
    def shared_kv_used(self) -> dict[str, tuple[int, ...]]:
        """By canonical key, which of the shared KV groups this rank reads over the whole sequence."""
        used = {}
        for prefix, branch in self._projected:
            places = branch.shared_used(self.rank)
            if places:
                used[f"{prefix}k"] = used[f"{prefix}v"] = places
        return used

    @functools.cached_property
    def gathers_shared_kv(self) -> bool:
        """Whether some rank reads a shared KV group over the whole sequence.

        Not so where all its readers work on slices: FA heads that every rank holds, k and v tied.
        """
        ranks = range(len(self._gdn.heads_by_rank))
        return any(branch.shared_used(rank) for _, branch in self._projected for rank in ranks)

    @functools.cached_property
    def tied_kv_places(self) -> dict[str, tuple[int, ...]]:
        """Where each branch of this rank finds its KV heads in the tied k and v of this rank.

        Those are, over the whole sequence, the groups that only this rank reads and then the shared
        ones that it uses; for FA heads that every rank holds, all shared ones, over its slice. The
        order is that of :attr:`fa_kv_of_heads` and :attr:`gdn_kv_of_heads`.
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

    @property
    def conv_segments(self) -> tuple[Segment, ...]:
        """Rows of the convolution weight: this rank's q, k and v channels."""
        slots, own = self._gdn.head_slots(self.gdn), self._gdn.kv_slots(self._gdn.own_kv(self.rank))
        heads, kv, d = len(self._gdn.heads), len(self._gdn.kv), self.model.head_dim
        return _nonempty(
            Segment("conv_q", slots, heads, d),
            Segment("conv_k", own, kv, d),
            Segment("conv_v", own, kv, d),
        )

    @property
    def shared_conv_segments(self) -> tuple[Segment, ...]:
        """Rows of the convolution weight of shared KV groups."""
        slots, kv = self._gdn.kv_slots(self._gdn.shared), len(self._gdn.kv)
        return tuple(Segment(name, slots, kv, self.model.head_dim) for name in ("conv_k", "conv_v"))

    @property
    def per_gdn_head_segments(self) -> tuple[Segment, ...]:
        """Entries of a parameter with one number per GDN head."""
        slots = self._gdn.head_slots(self.gdn)
        return _nonempty(Segment("", slots, len(self._gdn.heads), 0))

    @property
    def gamma_segments(self) -> tuple[Segment, ...]:
        """Entries of γ: one a head, or one for each of its two outputs where every head is both."""
        if not self.mixed:
            return self.head_segments(self.sharded, 0)
        total = self.model.num_query_heads
        heads = tuple(self.sharded)
        return _nonempty(Segment("fa", heads, total, 0), Segment("gdn", heads, total, 0))

    def head_segments(self, heads: Sequence[int], size: int) -> tuple[Segment, ...]:
        """Entries of a parameter over all heads of the layer, in original head order."""
        return _nonempty(Segment("", tuple(heads), self.model.num_query_heads, size))

    def _in_segments(self, rank: int) -> tuple[Segment, ...]:
        fa = self._fa_segments(self._fa, self._fa.heads_by_rank[rank], self._fa.own_kv(rank))
        branch, heads = self._gdn, self._gdn.heads_by_rank[rank]
        slots, total, d = branch.head_slots(heads), len(branch.heads), self.model.head_dim
        tied = self._kv_segments("", self._both, self._both.own_kv(rank)) if self.tied else ()
        gdn = [
            Segment("gdn.q", slots, total, d),
            *(() if self.tied else self._kv_segments("gdn.", branch, branch.own_kv(rank))),
            *([Segment("gdn.gate", slots, total, d)] if self.model.switches.gdn_gate else []),
            Segment("gdn.b", slots, total, 0),
            Segment("gdn.a", slots, total, 0),
        ]
        return (*fa, *tied, *_nonempty(*gdn))

    def _fa_segments(
        self, branch: _Branch, heads: Sequence[int], own_kv: Sequence[int]
    ) -> tuple[Segment, ...]:
        slots, total, d = branch.head_slots(heads), len(branch.heads), self.model.head_dim
        return _nonempty(
            Segment("fa.q", slots, total, d),
            *(() if self.tied else self._kv_segments("fa.", branch, own_kv)),
            *([Segment("fa.gate", slots, total, d)] if self.model.switches.fa_gate else []),
        )

    def _kv_segments(self, prefix: str, branch: _Branch, kv: Sequence[int]) -> tuple[Segment, ...]:
        slots, total = branch.kv_slots(kv), len(branch.kv)
        return _nonempty(
            *(Segment(f"{prefix}{part}", slots, total, self.model.head_dim) for part in "kv")
        )

    def _bias_segments(self, rank: int) -> tuple[Segment, ...]:
        return self._with_bias(self._in_segments(rank))

    def _with_bias(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
        biased = {"q", "k", "v"} if self.model.qkv_bias else set()
        gate = {"fa.gate"} if self.model.switches.fa_gate_bias else set()
        return tuple(s for s in segments if s.key in gate or s.key.rpartition(".")[2] in biased)


def _nonempty(*segments: Segment) -> tuple[Segment, ...]:
    return tuple(segment for segment in segments if segment.slots)
