"""The HydraHead layer's attention: a Megatron-Core self-attention that mixes FA and GDN heads.

The forward is design §2. :mod:`.head_projections` makes the q, k, v of each branch, and the head partition
decides which heads a rank has. The dense teacher is this module with FA heads only and the switches of
:data:`megatron_hydra.config.model.DENSE_ATTENTION`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.model.full_attention import FullAttention
from megatron_hydra.model.gated_delta_net import GatedDeltaNet
from megatron_hydra.model.head_fusion import HeadFusion
from megatron_hydra.model.head_projections import (
    HeadInputs,
    HeadProjections,
    HydraAttentionSubmodules,
)
from megatron_hydra.model.local_heads import LocalHeads
from megatron_hydra.model.local_parameters import declare
from megatron_hydra.model.recomputation import Recomputation
from megatron_hydra.ops.backends import Kernels
from megatron_hydra.ops.streams import side_by_side
from megatron_hydra.parallel.context_parallel import keep_in_graph
from megatron_hydra.parallel.head_partition import LayerPartition
from megatron_hydra.parallel.head_weights import segments_factory
from megatron_hydra.parallel.packed_sequence import PackedSequence


class HydraAttention(MegatronModule):
    """Head-level hybrid attention (design §2) with tensor, sequence and context parallelism (§6).

    Args:
        config: Megatron-Core's config.
        submodules: column- and row-parallel linears.
        layer_number: 1-based global layer number, as Megatron-Core counts.
        model: shapes, switches, and the FA heads of every layer.
        partitions: head partition of every layer.
        kernels: the chosen implementations.
        recompute: parts that the backward computes again: ``fa``, ``gdn`` and ``tail`` (gate, norm and scale),
            each from its own inputs; or ``attention``, all three as one.
        two_streams: on a GPU, run the branches in parallel if neither communicates.
        pg_collection: process groups (tp, cp, tp_cp are used).
        name: the module's name, which later releases of Megatron-Core pass; not used.
    """

    q_norm: torch.nn.Parameter | None  # of both branches; otherwise each branch has its own
    k_norm: torch.nn.Parameter | None

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
        self.layer_number, self.model = layer_number, model
        self.recompute, self.two_streams = Recomputation(recompute), two_streams
        self.tp_group, self.cp_group, self.tp_cp_group = groups.tp, groups.cp, groups.tp_cp
        self.tp_rank = get_pg_rank(self.tp_group)
        self.heads = heads = LocalHeads(model, partitions[layer_number - 1], self.tp_rank)
        dtype = config.params_dtype
        self.projections = HeadProjections(config, submodules, heads, self.tp_group)
        declare(self, heads.parameters, "", dtype)
        self.fa = self.gdn = None
        if heads.layer_has_fa:
            self.fa = FullAttention(model, heads, dtype, kernels)
        if heads.layer_has_gdn:
            self.gdn = GatedDeltaNet(model, heads, dtype, kernels, self.cp_group)
        self.fusion = HeadFusion(heads, dtype, kernels, self.recompute, self.tp_group)
        self._idle = self._idle_parameters()

    def _idle_parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """Parameters without work on this rank, because it has no head of their branch, or no head at all."""
        working = {"fa": bool(self.heads.num_fa_here), "gdn": bool(self.heads.gdn)}
        return tuple(
            self.get_parameter(local.name)
            for local in self.heads.parameters
            if not working.get(local.name.partition(".")[0], local.is_used)
        )

    # -- forward: design §2 -------------------------------------------------------------------

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSequence | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention.

        Args:
            hidden_states: ``[T_local, 1, D]`` of one packed stream (``T_local/TP`` under sequence
                parallelism), after the input norm.
            attention_mask: not used; documents come from ``packed_seq_params``.
            packed_seq_params: the stream's documents and this rank's shard.
            unused: arguments that a stock ``TransformerLayer`` passes for other attentions.

        Returns:
            Output like ``hidden_states``, and a bias to add to it or ``None``.
        """
        if packed_seq_params is None or hidden_states.shape[1] != 1:
            raise ValueError(
                "HydraAttention takes one packed stream [T, 1, D] and its PackedSequence"
            )
        x_slice = self._sequence_slice(hidden_states) if self.heads.needs_slice else None
        inputs = self.projections(hidden_states, x_slice)
        shares = self.fusion.shares(x_slice)
        mixed = self.recompute("attention", self.mix, inputs, packed_seq_params, shares)
        output = self.projections.output(*mixed)
        # Overlapped gradient reduction waits for every parameter. Idle parameters are added at the output, not
        # at the input: an input without gradient (stage 1) would get one on ranks with idle parameters only,
        # with collectives that other ranks do not join.
        for parameter in self._idle:
            output = keep_in_graph(output, parameter)
        return output, self.projections.out_bias

    def mix(
        self, inputs: HeadInputs, packed: PackedSequence, shares: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both branches and the fusion: ``[T_local, n·d]`` of the heads that only this rank has, and
        ``[T_local/TP, m·d]`` of the FA heads that every rank has (``None`` without such heads).
        """
        o_fa, o_gdn = self._branches(inputs, packed)
        own, replicated = [], None
        if inputs.fa is not None and o_fa is not None:
            if self.heads.replicated_fa:
                replicated = self.fusion.on_slice((o_fa, inputs.fa.gate), shares)
            else:
                own.append((o_fa, inputs.fa.gate))
        if inputs.gdn is not None and o_gdn is not None:
            own.append((o_gdn, inputs.gdn.gate))
        joined = self.fusion(own, shares) if own else None
        if inputs.idle is not None:  # a rank without heads still takes part in the collectives
            joined = keep_in_graph(inputs.idle.new_zeros(inputs.idle.shape[0], 0), inputs.idle)
            joined = joined if shares is None else keep_in_graph(joined, shares)
        return joined, replicated

    def _branches(
        self, inputs: HeadInputs, packed: PackedSequence
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Head outputs o_h of both branches, computed in parallel if they share nothing."""

        def full_attention(*qk_and_v: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.recompute("fa", self.full_attention, *qk_and_v, packed)
            return output

        def gated_delta_net() -> torch.Tensor:
            assert self.gdn is not None
            norms = (self.q_norm, self.k_norm)
            output: torch.Tensor = self.recompute("gdn", self.gdn, inputs.gdn, packed, norms)
            return output

        if inputs.fa is None:
            return None, None if inputs.gdn is None else gated_delta_net()
        qk_and_v = inputs.fa[:2]
        if inputs.gdn is None or not self._branches_are_independent():
            return full_attention(*qk_and_v), None if inputs.gdn is None else gated_delta_net()
        return side_by_side(full_attention, qk_and_v, gated_delta_net)

    def full_attention(
        self, qk: torch.Tensor, v: torch.Tensor, packed: PackedSequence
    ) -> torch.Tensor:
        """The FA branch; on this rank's slice of the sequence if every rank has its heads."""
        positions = packed.positions_local
        if self.heads.replicated_fa:
            length = qk.shape[0]
            positions = positions[self.tp_rank * length : (self.tp_rank + 1) * length]
        assert self.fa is not None
        norms = (self.q_norm, self.k_norm)
        output: torch.Tensor = self.fa(qk, v, packed, self._fa_group, positions, norms)
        return output

    # -- layout -------------------------------------------------------------------------------

    def _sequence_slice(self, x: torch.Tensor) -> torch.Tensor:
        """This tensor-parallel rank's slice of the sequence, ``[T_local/TP, D]``."""
        if not self.config.sequence_parallel:
            x = scatter_to_sequence_parallel_region(x, group=self.tp_group)
        return x.squeeze(1)

    def _branches_are_independent(self) -> bool:
        """Whether the branches share nothing while they run.

        Collectives of one group must not run on two streams at once. Rotary tables are cached by the branch
        that runs first.
        """
        own_tables = not self.model.switches.fa_rotates(self.heads.layer)
        return self.two_streams and own_tables and self._fa_group.size() == 1

    @property
    def _fa_group(self) -> dist.ProcessGroup:
        """The ranks that share the sequence in the FA branch; they include those of the GDN branch."""
        return self.tp_cp_group if self.heads.replicated_fa else self.cp_group

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Parameters as canonical per-head slices, the same for every layout (design §6).

        Args:
            prefix: this module's prefix, ending in a dot; checkpoint keys start with it.
            sharded_offsets: must be empty, because layers are stored one by one.
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
