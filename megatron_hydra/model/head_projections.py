"""Project a layer's input to q, k, v and gates of each head, and head outputs to the layer's output.

One GEMM projects for all heads of a rank. Two more are needed if tensor-parallel ranks share heads. FA heads
that every rank has are computed on its slice of the sequence. KV groups that several ranks read are projected
by slices, which are gathered. The branches do not see this.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hydra.model.full_attention import FullAttentionInputs
from megatron_hydra.model.gated_delta_net import GatedDeltaNetInputs
from megatron_hydra.model.local_heads import LocalHeads
from megatron_hydra.model.local_parameters import declare
from megatron_hydra.ops.device_cache import int_tensor
from megatron_hydra.parallel.context_parallel import gather_sequence, keep_in_graph
from megatron_hydra.parallel.head_weights import Segment, joined, split_segments

_QKV_OF_GDN = ("gdn.q", "gdn.k", "gdn.v")
_QK_OF_FA = ("fa.q", "fa.k")

Rows = dict[str, torch.Tensor]
"""Pieces ``[T, rows]`` of one projection by canonical name, e.g. ``fa.q``."""


@dataclasses.dataclass
class HydraAttentionSubmodules:
    """The linears of the layer, from Megatron-Core's backend provider."""

    in_proj: Any = None
    out_proj: Any = None


class KeyValues(NamedTuple):
    """Keys and values ``[T, m·d]`` of some KV heads."""

    k: torch.Tensor
    v: torch.Tensor


class HeadInputs(NamedTuple):
    """The branches' inputs; ``None`` if this rank has no head of the kind.

    Attributes:
        fa: of FA heads: for ``[T_local]``, or for this rank's slice of it if every rank has the heads.
        gdn: of GDN heads.
        idle: ``[T_local, rows]`` on a rank without own heads, which still takes part in collectives.
    """

    fa: FullAttentionInputs | None
    gdn: GatedDeltaNetInputs | None
    idle: torch.Tensor | None


class HeadProjections(torch.nn.Module):
    """The projections W_q, W_k, W_v, W_g, W_a, W_b and W_o of this rank's heads (design §2, §6).

    Args:
        config: Megatron-Core's config.
        submodules: column- and row-parallel linears.
        heads: the rank's heads and its parameters.
        tp_group: tensor-parallel ranks.
    """

    in_bias: torch.nn.Parameter | None
    fa_in: torch.nn.Parameter | None
    fa_in_bias: torch.nn.Parameter | None
    fa_out: torch.nn.Parameter | None
    shared_kv: torch.nn.Parameter | None
    shared_kv_bias: torch.nn.Parameter | None
    out_bias: torch.nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HydraAttentionSubmodules,
        heads: LocalHeads,
        tp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__()
        self.config, self.heads, self.tp_group = config, heads, tp_group
        self.head_dim = heads.model.head_dim
        self.in_proj = self.out_proj = None
        if heads.num_sharded_padded:
            self._build_linears(submodules)
        declare(
            self, heads.parameters, "projections.", config.params_dtype, config.sequence_parallel
        )
        self.in_segments, self.bias_segments = heads.in_segments, heads.in_bias_segments
        self.fa_in_segments, self.fa_bias_segments = heads.fa_in_segments, heads.fa_bias_segments
        # One convolution for all of GDN's, one preparation of FA's queries and keys, without copies.
        if not (heads.tied or "gdn.k" in heads.shared_kv_used):
            self.in_segments, self.bias_segments = (
                joined(segments, _QKV_OF_GDN, "gdn.qkv")
                for segments in (self.in_segments, self.bias_segments)
            )
        if not (heads.tied or "fa.k" in heads.shared_kv_used):
            self.in_segments, self.bias_segments, self.fa_in_segments, self.fa_bias_segments = (
                joined(segments, _QK_OF_FA, "fa.qk")
                for segments in (
                    self.in_segments,
                    self.bias_segments,
                    self.fa_in_segments,
                    self.fa_bias_segments,
                )
            )

    def _build_linears(self, submodules: HydraAttentionSubmodules) -> None:
        """Linears of local sizes, padded to the largest rank's: ranks may have different heads, but Megatron's
        distributed optimizer needs the same buffer layout on all ranks.
        """
        hidden, ranks = self.heads.model.hidden_size, self.tp_group.size()
        common: dict[str, Any] = {
            "config": self.config,
            "init_method": self.config.init_method,
            "bias": False,
            "skip_bias_add": True,
            "is_expert": False,
            "tp_group": self.tp_group,
        }
        self.in_proj = build_module(
            submodules.in_proj,
            hidden,
            self.heads.in_rows_padded * ranks,
            gather_output=False,
            tp_comm_buffer_name="qkv",
            **common,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            self.heads.num_sharded_padded * self.head_dim * ranks,
            hidden,
            input_is_parallel=True,
            tp_comm_buffer_name="proj",
            **common,
        )

    # -- input --------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, x_slice: torch.Tensor | None) -> HeadInputs:
        """Project.

        Args:
            x: ``[T_local, 1, D]`` (``[T_local/TP, 1, D]`` under sequence parallelism).
            x_slice: ``[T_local/TP, D]``, this tensor-parallel rank's slice, if :attr:`.LocalHeads.needs_slice`.
        """
        own: Rows = {}
        idle = None
        if self.in_proj is not None:
            projected = self.in_proj(x)[0].squeeze(1)
            own = _split(projected, self.in_segments, self.in_bias, self.bias_segments)
            idle = None if self.heads.sharded else projected
        return self.branch_inputs(own, x_slice, idle)

    def branch_inputs(
        self, own: Rows, x_slice: torch.Tensor | None, idle: torch.Tensor | None
    ) -> HeadInputs:
        """Join ``own``, which only this rank has, with the heads that it shares with others."""
        heads, replicated, shared_slice, shared = self.heads, Rows(), Rows(), Rows()
        if self.fa_in is not None and x_slice is not None:
            projected = F.linear(x_slice, self.fa_in)
            replicated = _split(
                projected, self.fa_in_segments, self.fa_in_bias, self.fa_bias_segments
            )
        if self.shared_kv is not None and x_slice is not None:
            # Each rank projects its slice, and the slices are gathered. So no work is repeated, and the
            # gradient is the sum over all readers.
            projected = F.linear(x_slice, self.shared_kv, self.shared_kv_bias)
            if heads.tied and heads.replicated_fa:
                shared_slice = split_segments(projected, heads.shared_kv_segments, 1)
            if heads.gathers_shared_kv:
                gathered = gather_sequence(projected, self.tp_group)
                shared = split_segments(gathered, heads.shared_kv_segments, 1)
                if not heads.shared_kv_used:  # this rank reads no shared group
                    if idle is not None:
                        idle = keep_in_graph(idle, gathered)
                    else:
                        rows = own or replicated
                        first = next(iter(rows))
                        rows[first] = keep_in_graph(rows[first], gathered)
        both = self._key_values("", own, shared) if heads.tied else None
        return HeadInputs(
            self._of_fa(own, replicated, both, shared_slice, shared),
            self._of_gdn(own, both, shared),
            idle,
        )

    def _of_fa(
        self, own: Rows, replicated: Rows, both: KeyValues | None, shared_slice: Rows, shared: Rows
    ) -> FullAttentionInputs | None:
        heads = self.heads
        if not heads.num_fa_here:
            return None
        rows = own if heads.fa else replicated
        rest = _named(FullAttentionInputs, rows, "fa.")
        if (qk := rows.get("fa.qk")) is not None:
            return FullAttentionInputs(qk, rows["fa.v"], *rest)
        if heads.tied:
            if heads.replicated_fa:
                both = KeyValues(shared_slice["k"], shared_slice["v"])
            kv = self._branch_keys_and_values(both, "fa")
        else:
            found = self._key_values("fa.", own, shared)
            assert found is not None
            kv = found
        return FullAttentionInputs(torch.cat((rows["fa.q"], kv.k), dim=1), kv.v, *rest)

    def _of_gdn(
        self, own: Rows, both: KeyValues | None, shared: Rows
    ) -> GatedDeltaNetInputs | None:
        if not self.heads.gdn:
            return None
        qkv = own.get("gdn.qkv")
        if qkv is None:
            kv = (
                self._branch_keys_and_values(both, "gdn")
                if self.heads.tied
                else self._key_values("gdn.", own, shared)
            )
            assert kv is not None
            qkv = torch.cat((own["gdn.q"], *kv), dim=1)
        return GatedDeltaNetInputs(qkv, *_named(GatedDeltaNetInputs, own, "gdn."))

    def _key_values(self, prefix: str, own: Rows, shared: Rows) -> KeyValues | None:
        """Keys and values for the whole sequence: first of KV groups that only this rank reads, then shared."""
        found = []
        for key in (f"{prefix}k", f"{prefix}v"):
            pieces = [own[key]] if key in own else []
            if key in self.heads.shared_kv_used:
                pieces.append(self._columns(shared[key], self.heads.shared_kv_used[key]))
            if not pieces:
                return None
            found.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1))
        return KeyValues(*found)

    def _branch_keys_and_values(self, both: KeyValues | None, branch: str) -> KeyValues:
        """A branch's heads of the keys and values that both branches read (``hydra.qkv=shared``)."""
        assert both is not None
        places = self.heads.tied_kv_places[branch]
        return KeyValues(*(self._columns(x, places) for x in both))

    def _columns(self, x: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
        """These heads of ``[T, n·d]``, in this order; a copy unless they are all heads."""
        by_head = x.unflatten(-1, (-1, self.head_dim))
        if heads == tuple(range(by_head.shape[1])):
            return x
        return by_head.index_select(1, int_tensor(heads, torch.int64, x.device)).flatten(1)

    # -- output -------------------------------------------------------------------------------

    def output(self, own: torch.Tensor | None, replicated: torch.Tensor | None) -> torch.Tensor:
        """W_o: ``[T, 1, D]`` laid out like the layer's input.

        Args:
            own: ``[T_local, n·d]`` of the heads that only this rank has; ``None`` if no rank has such heads.
            replicated: ``[T_local/TP, m·d]`` of the FA heads that every rank has, or ``None``.
        """
        output = None
        if self.out_proj is not None:
            assert own is not None
            missing = self.heads.num_sharded_padded * self.head_dim - own.shape[1]
            if missing:
                own = F.pad(own, (0, missing))
            output, _ = self.out_proj(own.unsqueeze(1))
        if replicated is not None:
            assert self.fa_out is not None
            added = F.linear(replicated, self.fa_out).unsqueeze(1)
            if not self.config.sequence_parallel:
                # Gather the slices; every rank's gradient of the whole is already complete.
                added = gather_from_sequence_parallel_region(
                    added, tensor_parallel_output_grad=False, group=self.tp_group
                )
            output = added if output is None else output + added
        assert output is not None
        return output


def _named(inputs: Any, rows: Rows, prefix: str) -> list[Any]:
    """A branch's gates and logits by field name; ``None`` for those that the model does not have."""
    fields = [name for name in inputs._fields if name not in ("qk", "v", "qkv")]
    return [rows.get(prefix + name) for name in fields]


def _split(
    projected: torch.Tensor,
    segments: tuple[Segment, ...],
    bias: torch.Tensor | None,
    bias_segments: tuple[Segment, ...],
) -> Rows:
    """Pieces of a projection, with their biases."""
    rows = split_segments(projected, segments, 1)
    if bias is None:
        return rows
    biases = split_segments(bias, bias_segments, 0)
    return {key: row + biases[key] if key in biases else row for key, row in rows.items()}
