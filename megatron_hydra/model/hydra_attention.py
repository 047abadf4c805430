"""The HydraHead layer's attention: a Megatron-Core self-attention that mixes FA and GDN heads.

Projections live here, fused over heads, so that each branch sees only its own q, k, v; the head
partition decides which rows a rank holds. The dense teacher is this module with every head FA and
the switches of :data:`megatron_hydra.config.model.DENSE_ATTENTION`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.model.full_attention import FullAttention
from megatron_hydra.model.gated_delta_net import GatedDeltaNet
from megatron_hydra.model.local_heads import LocalHeads, declare
from megatron_hydra.ops.backends import Kernels
from megatron_hydra.ops.device_cache import int_tensor
from megatron_hydra.ops.fusion_tail import Branch
from megatron_hydra.ops.streams import side_by_side
from megatron_hydra.parallel.context_parallel import gather_sequence, keep_in_graph
from megatron_hydra.parallel.head_partition import LayerPartition
from megatron_hydra.parallel.head_weights import (
    joined,
    segments_factory,
    split_segments,
)
from megatron_hydra.parallel.packed_sequence import PackedSequence

Parts = dict[str, torch.Tensor]

_GDN_QKV = ("gdn.q", "gdn.k", "gdn.v")


@dataclasses.dataclass
class HydraAttentionSubmodules:
    """The linears of the layer, from Megatron-Core's backend provider."""

    in_proj: Any = None
    out_proj: Any = None


class HydraAttention(MegatronModule):
    """Head-level hybrid attention (design §2), tensor-, sequence- and context-parallel (§6).

    Args:
        config: Megatron-Core's config.
        submodules: column- and row-parallel linears.
        layer_number: 1-based global layer number, as Megatron-Core counts.
        model: shapes, switches, and the FA heads of every layer.
        partitions: head partition of every layer.
        kernels: the chosen implementations.
        recompute: what is computed again in the backward pass instead of kept: of ``fa``, ``gdn`` and
            ``tail`` (gate, norm and scale) each with its own inputs, ``attention`` all three as one.
        two_streams: on a GPU, run the branches side by side where neither communicates.
        pg_collection: process groups (tp, cp, tp_cp are used).
        name: the module's name, which later releases of Megatron-Core give; not used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HydraAttentionSubmodules,
        layer_number: int,
        model: ModelConfig,
        partitions: tuple[LayerPartition, ...],
        kernels: Kernels,
        recompute: Collection[str] = (),
        two_streams: bool = True,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.layer_number, self.model, self.kernels = layer_number, model, kernels
        self.switches, self.head_dim = model.switches, model.head_dim
        self.recompute, self.two_streams = frozenset(recompute), two_streams
        self.tp_group, self.cp_group, self.tp_cp_group = groups.tp, groups.cp, groups.tp_cp
        self.tp_rank = get_pg_rank(self.tp_group)
        self.heads = LocalHeads(model, partitions[layer_number - 1], self.tp_rank)
        self._in_parts, self._bias_parts = self.heads.in_segments, self.heads.in_bias_segments
        if not (self.heads.tied or "gdn.k" in self.heads.shared_kv_used):
            # One convolution for the three, without a copy.
            self._in_parts, self._bias_parts = (
                joined(segments, _GDN_QKV, "gdn.qkv")
                for segments in (self._in_parts, self._bias_parts)
            )
        self._build_projections(submodules)
        declare(self, self.heads, "", config.params_dtype, config.sequence_parallel)
        self._build_branches()
        self._idle = self._idle_parameters()

    # -- construction -------------------------------------------------------------------------

    def _build_projections(self, submodules: HydraAttentionSubmodules) -> None:
        heads, tp_size = self.heads, self.tp_group.size()
        common: dict[str, Any] = {
            "config": self.config,
            "init_method": self.config.init_method,
            "skip_bias_add": True,
            "is_expert": False,
            "tp_group": self.tp_group,
        }
        self.in_proj = self.out_proj = None
        if heads.num_sharded_padded:
            # Sizes are per rank and padded to the largest: ranks may hold different heads, but
            # Megatron's distributed optimizer wants the same buffer layout on all of them.
            self.in_proj = build_module(
                submodules.in_proj,
                self.model.hidden_size,
                heads.in_rows_padded * tp_size,
                gather_output=False,
                bias=False,
                tp_comm_buffer_name="qkv",
                **common,
            )
            self.out_proj = build_module(
                submodules.out_proj,
                heads.num_sharded_padded * self.head_dim * tp_size,
                self.model.hidden_size,
                input_is_parallel=True,
                bias=False,
                tp_comm_buffer_name="proj",
                **common,
            )

    def _build_branches(self) -> None:
        heads, dtype = self.heads, self.config.params_dtype
        self.fa = self.gdn = None
        if heads.layer_has_fa:
            self.fa = FullAttention(self.model, heads, dtype, self.kernels)
        if heads.layer_has_gdn:
            self.gdn = GatedDeltaNet(self.model, heads, dtype, self.kernels, self.cp_group)

    def _idle_parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """Parameters without work on this rank: it has no head of their branch."""
        idle: list[torch.nn.Parameter] = []
        if self.fa is not None and not self.heads.num_fa_here:
            idle += self.fa.parameters()
        if self.gdn is not None and not self.heads.gdn:
            idle += self.gdn.parameters()
        for local in self.heads.parameters:
            if local.sharded and not local.segments and "." not in local.name:
                idle.append(self.get_parameter(local.name))
        return tuple(idle)

    # -- forward ------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSequence | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix tokens.

        Args:
            hidden_states: ``[T_local, 1, D]`` of one packed stream (``T_local/TP`` under sequence
                parallelism), after the input norm.
            attention_mask: not used; documents come from ``packed_seq_params``.
            packed_seq_params: the stream's documents and this rank's shard.
            unused: what a stock ``TransformerLayer`` passes for other attentions.

        Returns:
            Output like ``hidden_states``, and a bias to add to it or ``None``.
        """
        if packed_seq_params is None or hidden_states.shape[1] != 1:
            raise ValueError(
                "HydraAttention takes one packed stream [T, 1, D] and its PackedSequence"
            )
        packed = packed_seq_params
        sliced = self._sequence_slice(hidden_states) if self.heads.needs_slice else None
        parts = self._project(hidden_states, sliced)
        weights = self._fusion_weights(sliced)
        mixed = self._computed("attention", self._mix, parts, packed, weights)
        output = self._output(*mixed)
        # Overlapped gradient reduction waits for every parameter. Kept at the output, not at the
        # input: an input that needs no gradient (stage 1) would get one on ranks with idle
        # parameters only, and with it collectives that the others do not join.
        for parameter in self._idle:
            output = keep_in_graph(output, parameter)
        return output, self.out_bias

    def _computed(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``, again in the backward pass if ``name`` is to be recomputed."""
        if name not in self.recompute or not torch.is_grad_enabled():
            return function(*arguments)
        # Stopping a recomputation early could skip a collective on some ranks only.
        with set_checkpoint_early_stop(False):
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

    def _sequence_slice(self, x: torch.Tensor) -> torch.Tensor:
        """This tensor-parallel rank's slice of the sequence, ``[T_local/TP, D]``."""
        if not self.config.sequence_parallel:
            x = scatter_to_sequence_parallel_region(x, group=self.tp_group)
        return x.squeeze(1)

    def _project(self, x: torch.Tensor, sliced: torch.Tensor | None) -> Parts:
        """All projections of the layer by canonical name, as ``[T, rows]``."""
        heads, parts = self.heads, {}
        if self.in_proj is not None:
            projected, _ = self.in_proj(x)
            parts.update(split_segments(projected.squeeze(1), self._in_parts, 1))
            if not heads.sharded:
                parts["idle"] = projected.squeeze(1)
            if self.in_bias is not None:
                biases = split_segments(self.in_bias, self._bias_parts, 0)
                parts.update({key: parts[key] + bias for key, bias in biases.items()})
        if self.fa_in is not None and sliced is not None:
            projected = F.linear(sliced, self.fa_in)
            parts.update(split_segments(projected, heads.fa_in_segments, 1))
            if self.fa_in_bias is not None:
                biases = split_segments(self.fa_in_bias, heads.fa_bias_segments, 0)
                parts.update({key: parts[key] + bias for key, bias in biases.items()})
        if self.shared_kv is not None and sliced is not None:
            self._add_shared_kv(parts, sliced)
        if heads.tied:
            self._hand_out_tied_kv(parts)
        if "gdn.q" in parts:
            parts["gdn.qkv"] = torch.cat([parts.pop(key) for key in _GDN_QKV], dim=1)
        return parts

    def _add_shared_kv(self, parts: Parts, sliced: torch.Tensor) -> None:
        """Append to k and v the KV groups that several tensor-parallel ranks read.

        Each rank projects its slice of the sequence and the slices are gathered, so the work is not
        repeated and the gradient is the sum over all readers. FA heads that every rank holds read the
        slice as it is, where it is theirs too (``qkv=shared``).
        """
        assert self.shared_kv is not None
        heads = self.heads
        projected = F.linear(sliced, self.shared_kv, self.shared_kv_bias)
        if heads.tied and heads.replicated_fa:
            of_slice = split_segments(projected, heads.shared_kv_segments, 1)
            for part in "kv":
                parts[f"fa.{part}"] = self._columns(of_slice[part], heads.tied_kv_places["fa"])
        if not heads.gathers_shared_kv:
            return
        gathered = gather_sequence(projected, self.tp_group)
        shared = split_segments(gathered, heads.shared_kv_segments, 1)
        for key, used in heads.shared_kv_used.items():
            columns = self._columns(shared[key], used)
            own = parts.get(key)
            parts[key] = columns if own is None else torch.cat((own, columns), dim=1)
        if not heads.shared_kv_used:
            first = next(iter(parts))
            parts[first] = keep_in_graph(parts[first], gathered)

    def _hand_out_tied_kv(self, parts: Parts) -> None:
        """Give each branch its heads of the k and v that both read."""
        both = {part: parts.pop(part) for part in "kv" if part in parts}
        for branch, places in self.heads.tied_kv_places.items():
            for part in "kv":
                if f"{branch}.{part}" not in parts:  # FA on slices has them already
                    parts[f"{branch}.{part}"] = self._columns(both[part], places)

    def _columns(self, x: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
        """These heads of ``[T, n·d]``, in this order; a copy unless they are all of them."""
        by_head = x.unflatten(-1, (-1, self.head_dim))
        if heads == tuple(range(by_head.shape[1])):
            return x
        return by_head.index_select(1, int_tensor(heads, torch.int64, x.device)).flatten(1)

    def _fusion_weights(self, sliced: torch.Tensor | None) -> torch.Tensor | None:
        """Gated competition: H · softmax over all heads of W_f x, ``[T_local, H]`` on every rank.

        Where every head is both, its two outputs compete: 2σ(W_f x) and 2σ(−W_f x), ``[T_local, 2H]``.
        """
        if self.fusion_gate is None or sliced is None:
            return None
        logits = F.linear(sliced, self.fusion_gate).float()
        if self.heads.mixed:
            shares = 2.0 * torch.sigmoid(torch.cat((logits, -logits), dim=-1))
        else:
            shares = logits.softmax(-1) * self.model.num_query_heads
        return gather_sequence(shares, self.tp_group)

    def _mix(
        self, parts: Parts, packed: PackedSequence, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both branches and the fusion: ``[T_local, n·d]`` of sharded and ``[T_slice, m·d]`` of
        replicated heads (``None`` where there are none).
        """
        sharded: list[Branch] = []
        replicated = None
        fa_output, gdn_output = self._branches(parts, packed)
        if fa_output is not None:
            branch = (fa_output, parts.get("fa.gate"))
            if self.heads.replicated_fa:
                replicated = self._fused([branch], self._fa_scale(weights))
            else:
                sharded.append(branch)
        if gdn_output is not None:
            sharded.append((gdn_output, parts.get("gdn.gate")))

        joined = self._fused(sharded, self._scale(weights)) if sharded else None
        if joined is not None and self.heads.mixed:  # the two outputs of every head
            joined = joined.unflatten(1, (2, -1)).sum(1)
        if "idle" in parts:  # a rank without heads still takes part in the collectives
            idle = parts["idle"]
            joined = keep_in_graph(idle.new_zeros(idle.shape[0], 0), idle)
            joined = joined if weights is None else keep_in_graph(joined, weights)
        return joined, replicated

    def _branches(
        self, parts: Parts, packed: PackedSequence
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Head outputs of both branches, side by side where they share nothing."""
        fa = self.fa if self.heads.num_fa_here else None
        gdn = self.gdn if self.heads.gdn else None

        def full_attention(*qkv: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self._computed("fa", self._full_attention, *qkv, packed)
            return output

        def gated_delta_net() -> torch.Tensor:
            assert gdn is not None
            arguments = [parts[f"gdn.{name}"] for name in ("qkv", "b", "a")]
            norms = (self.q_norm, self.k_norm)
            output: torch.Tensor = self._computed("gdn", gdn, *arguments, packed, norms)
            return output

        if fa is None:
            return None, None if gdn is None else gated_delta_net()
        qkv = (parts["fa.q"], parts["fa.k"], parts["fa.v"])
        if gdn is None or not self._branches_apart():
            return full_attention(*qkv), None if gdn is None else gated_delta_net()
        return side_by_side(full_attention, qkv, gated_delta_net)

    def _branches_apart(self) -> bool:
        """Whether the branches share nothing while they run.

        Collectives of one group must not be in flight on two streams, and rotary tables are cached
        by whichever branch comes first.
        """
        own_tables = self.switches.fa_position in ("log-scale", "none")
        return self.two_streams and own_tables and self._fa_group.size() == 1

    @property
    def _fa_group(self) -> dist.ProcessGroup:
        """The ranks that share the sequence in the FA branch; those of GDN are among them."""
        return self.tp_cp_group if self.heads.replicated_fa else self.cp_group

    def _full_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequence
    ) -> torch.Tensor:
        positions = packed.positions_local
        if self.heads.replicated_fa:
            length = q.shape[0]
            positions = positions[self.tp_rank * length : (self.tp_rank + 1) * length]
        assert self.fa is not None
        norms = (self.q_norm, self.k_norm)
        output: torch.Tensor = self.fa(q, k, v, packed, self._fa_group, positions, norms)
        return output

    def _fused(self, branches: list[Branch], scale: torch.Tensor | None) -> torch.Tensor:
        """Gate, norm and scale of the branches' heads, side by side: ``[T, n·d]``."""
        eps = self.model.norm_eps if self.switches.fusion_norm == "rms" else None
        shaped: list[Branch] = [
            (output, None if gate is None else gate.unflatten(-1, (-1, self.head_dim)))
            for output, gate in branches
        ]
        fused: torch.Tensor = self._computed("tail", self.kernels.fusion_tail, shaped, scale, eps)
        return fused

    def _scale(self, weights: torch.Tensor | None) -> torch.Tensor | None:
        """γ of the sharded heads, times their share of the competition."""
        if self.gamma is None:
            return None
        outputs = self.heads.sharded
        if self.heads.mixed:
            outputs = (*outputs, *(self.model.num_query_heads + h for h in outputs))
        gamma = self.gamma[: len(outputs)]
        return gamma if weights is None else gamma * self._of_heads(weights, outputs)

    @staticmethod
    def _of_heads(weights: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        return weights.index_select(1, int_tensor(tuple(heads), torch.int64, weights.device))

    def _fa_scale(self, weights: torch.Tensor | None) -> torch.Tensor | None:
        if self.fa_gamma is None:
            return None
        if weights is None:
            return self.fa_gamma
        length = weights.shape[0] // self.tp_group.size()
        own = weights[self.tp_rank * length : (self.tp_rank + 1) * length]
        return self.fa_gamma * self._of_heads(own, self.heads.replicated_fa)

    def _output(self, joined: torch.Tensor | None, replicated: torch.Tensor | None) -> torch.Tensor:
        """Output projection of both parts, ``[T, 1, D]`` laid out like the layer's input."""
        output = None
        if self.out_proj is not None:
            assert joined is not None
            missing = self.heads.num_sharded_padded * self.head_dim - joined.shape[1]
            if missing:
                joined = F.pad(joined, (0, missing))
            output, _ = self.out_proj(joined.unsqueeze(1))
        if replicated is not None:
            assert self.fa_out is not None
            added = F.linear(replicated, self.fa_out).unsqueeze(1)
            if not self.config.sequence_parallel:
                # From slices to the whole; every rank's gradient of the whole is complete already.
                added = gather_from_sequence_parallel_region(
                    added, tensor_parallel_output_grad=False, group=self.tp_group
                )
            output = added if output is None else output + added
        assert output is not None
        return output

    # -- checkpoint ---------------------------------------------------------------------------

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Parameters as canonical per-head slices, the same for every layout (design §6).

        Args:
            prefix: this module's prefix, ending in a dot; checkpoint keys start with it.
            sharded_offsets: must be empty: layers are stored one by one.
            metadata: Megatron-Core's, with ``dp_cp_group``.
        """
        assert not sharded_offsets, "layers of a head-level hybrid are stored one by one"
        assert metadata is not None
        data_rank = metadata["dp_cp_group"].rank()
        state: dict[str, Any] = {}
        for name, parameter in self.named_parameters():
            local = self.heads.parameter(name)
            assert local is not None, name
            prefixed = prefix + local.key
            replica = (0, 0 if local.sharded else self.tp_rank, data_rank)
            if local.segments is None:
                state[prefix + name] = ShardedTensor.from_rank_offsets(
                    prefixed, parameter, replica_id=replica
                )
            else:
                state[prefix + name] = segments_factory(
                    prefixed, parameter, local.segments, replica, local.axis
                )
        return state
