"""The rows of an export's tensors on a rank, and their order.

All projections that read a layer's input are one matrix, so a token needs one product instead of up to eleven.
Its rows are blocks: queries of the FA heads, gates of the GDN heads, and so on. Heads have the rank's own
order, FA heads before GDN heads. The output projection's columns have the same order, so heads are never moved
back at run time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
from megatron_hydra.serving.vllm.placement import LocalHeads

ROW_MULTIPLE = 16
"""The joint projection is padded to a multiple of so many rows, which matrix units need."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a local tensor: some heads (or KV groups) of one tensor of the export.

    Attributes:
        name: of its content, e.g. ``gdn_q``.
        source: the export's parameter, below ``self_attn``, without ``.weight`` or ``.bias``.
        given: heads or groups in the export's tensor, in its order.
        taken: those of this rank, in local order; one may occur several times.
        size: number of rows of each.
    """

    name: str
    source: str
    given: tuple[int, ...]
    taken: tuple[int, ...]
    size: int

    @property
    def rows(self) -> int:
        """Rows of the whole block."""
        return len(self.taken) * self.size

    def take(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's part of the export's ``tensor``, along ``dim``."""
        index = torch.tensor([self.given.index(unit) for unit in self.taken], dtype=torch.int64)
        parts = tensor.unflatten(dim, (len(self.given), self.size))
        return parts.index_select(dim, index.to(tensor.device)).flatten(dim, dim + 1)


def placed(blocks: Sequence[Block]) -> Iterator[tuple[int, Block]]:
    """Each block and its first row, if the blocks are one below the other."""
    start = 0
    for block in blocks:
        yield start, block
        start += block.rows


class AttentionLayout:
    """The blocks of one layer's attention on one rank.

    Attributes:
        fa, gdn: local heads (original indices), in local order.
        fa_members: number of FA heads of each local KV group.
        gdn_kv: keys and values of the GDN heads: one for each head, or one for each KV group.
        gdn_kv_of: for each local GDN head, the index of its keys and values.
        projections: blocks of the joint projection.
        spans: rows of each of them, by its name.
        convolutions: blocks of the short convolution's channels; empty without it.
        output: columns of the output projection.
        gamma, decay: the scales of all local heads; A_log and dt_bias of the GDN heads.
    """

    def __init__(self, config: HydraHeadConfig, layer: int, local: LocalHeads) -> None:
        heads, d = config.num_attention_heads, config.head_dim
        per_group = heads // config.num_key_value_heads
        switches = config.hydra
        layer_fa = tuple(config.full_attention_heads[layer])
        layer_gdn = tuple(h for h in range(heads) if h not in set(layer_fa))
        self.fa, self.gdn = local.fa, local.gdn
        self.fa_members = [len(group) for group in local.fa_groups]
        own = switches["gdn_kv"] == "mha"

        def unit(head: int) -> int:
            return head if own else head // per_group

        self.gdn_kv = tuple(sorted({unit(h) for h in self.gdn}))
        self.gdn_kv_of = [self.gdn_kv.index(unit(h)) for h in self.gdn]
        fa_kv = tuple(group[0] // per_group for group in local.fa_groups)
        tied = switches["qkv"] == "shared"

        def keys(
            name: str, part: str, given: Sequence[int], taken: Sequence[int], shared: Sequence[int]
        ) -> Block:
            """Keys or values: from a branch's own projection, or from the one that all heads share."""
            if tied:
                groups = tuple(range(config.num_key_value_heads))
                return Block(f"{name}_{part}", f"{part}_proj", groups, tuple(shared), d)
            return Block(f"{name}_{part}", f"{name}_{part}_proj", tuple(given), tuple(taken), d)

        blocks: list[Block] = []
        if self.gdn:
            given = tuple(sorted({unit(h) for h in layer_gdn}))
            shared = [u // per_group if own else u for u in self.gdn_kv]
            blocks.append(Block("gdn_q", "gdn_q_proj", layer_gdn, self.gdn, d))
            blocks += [keys("gdn", part, given, self.gdn_kv, shared) for part in ("k", "v")]
        if self.fa:
            given = tuple(sorted({h // per_group for h in layer_fa}))
            blocks.append(Block("fa_q", "fa_q_proj", layer_fa, self.fa, d))
            blocks += [keys("fa", part, given, fa_kv, fa_kv) for part in ("k", "v")]
        for name, given, taken in (("fa", layer_fa, self.fa), ("gdn", layer_gdn, self.gdn)):
            if taken and switches[f"{name}_gate"]:
                blocks.append(Block(f"{name}_gate", f"{name}_gate_proj", given, taken, d))
        if self.gdn:
            for part in ("b", "a"):
                blocks.append(Block(f"gdn_{part}", f"gdn_{part}_proj", layer_gdn, self.gdn, 1))
        order = self.fa + self.gdn
        every = tuple(range(heads))
        if order and switches["fusion"] == "gated":  # a softmax over all heads, on every rank
            blocks.append(Block("fusion_gate", "fusion_gate", every, every, 1))
        self.projections = blocks
        self.spans = {b.name: slice(start, start + b.rows) for start, b in placed(blocks)}
        self.convolutions: list[Block] = []
        if self.gdn and switches["short_conv"]:
            units = tuple(sorted({unit(h) for h in layer_gdn}))
            self.convolutions = [Block("q", "gdn_q_conv", layer_gdn, self.gdn, d)]
            self.convolutions += [
                Block(part, f"gdn_{part}_conv", units, self.gdn_kv, d) for part in ("k", "v")
            ]
        self.output = Block("output", "o_proj", every, order, d)
        self.gamma = Block("gamma", "gamma", every, order, 1)
        self.decay = Block("decay", "", layer_gdn, self.gdn, 1)

    @property
    def rows(self) -> int:
        """Number of rows of the joint projection, with padding."""
        rows = sum(block.rows for block in self.projections)
        return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE

    @property
    def channels(self) -> int:
        """Number of channels of the GDN heads' q, k and v, which the short convolution reads."""
        names = ("gdn_q", "gdn_k", "gdn_v")
        return sum(block.rows for block in self.projections if block.name in names)
