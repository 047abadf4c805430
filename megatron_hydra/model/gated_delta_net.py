"""The branch of linear heads of a HydraHead layer: projections in, head outputs out (design §2).

It serves every rule of :mod:`megatron_hydra.ops.linear_rules`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.model.local_heads import LocalHeads
from megatron_hydra.model.local_parameters import declare, leading
from megatron_hydra.model.norm import QkNorms
from megatron_hydra.model.rotary import Rotary
from megatron_hydra.ops.backends import Kernels
from megatron_hydra.ops.delta_rule_gates import delta_rule_gates
from megatron_hydra.ops.device_cache import int_tensor
from megatron_hydra.ops.linear_rules import rule_of_model
from megatron_hydra.parallel.context_parallel import convolution_halo, state_exchange
from megatron_hydra.parallel.packed_sequence import PackedSequence
from megatron_hydra.parallel.token_window import delayed


class GatedDeltaNetInputs(NamedTuple):
    """Inputs of a rank's GDN heads.

    Attributes:
        qkv: ``[T_local, (n + 2m)·d]``, the heads of q, of k and of v one after the other.
        b, a: ``[T_local, n]`` logits of β and α; with a decay for each channel, a is ``[T_local, n·d]``.
        gate: ``[T_local, n·d]`` logits of the output gate, or ``None``.
    """

    qkv: torch.Tensor
    b: torch.Tensor
    a: torch.Tensor
    gate: torch.Tensor | None = None


class GatedDeltaNet(torch.nn.Module):
    """The linear rule of this rank's GDN heads (``hydra.linear``).

    Parameters are padded to equal sizes on all tensor-parallel ranks, because Megatron's optimizer needs equal
    buffers. Only the first entries are used.

    Args:
        model: shapes and switches.
        heads: the rank's heads. Their k and v have the order of :attr:`.LocalHeads.gdn_kv_of_heads`: first
            those that only this rank reads, then shared ones.
        dtype: of parameters that are not always fp32.
        kernels: the chosen implementations.
        cp_group: context-parallel ranks.
    """

    A_log: torch.nn.Parameter
    dt_bias: torch.nn.Parameter
    q_norm: torch.nn.Parameter | None
    k_norm: torch.nn.Parameter | None
    conv: torch.nn.Parameter | None
    shared_conv: torch.nn.Parameter | None  # rows: all k channels, then all v channels

    def __init__(
        self,
        model: ModelConfig,
        heads: LocalHeads,
        dtype: torch.dtype,
        kernels: Kernels,
        cp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__()
        self.head_dim, self.eps = model.head_dim, model.norm_eps
        self.num_heads = len(heads.gdn)
        self.kv_of_heads, self.shared_kv = heads.gdn_kv_of_heads, heads.gdn_shared_kv
        self.switches = model.switches
        self.decays_of_head = rule_of_model(model.switches).decays_of_head(model.head_dim)
        self.kernels, self.cp_group = kernels, cp_group
        self.rotary = Rotary(model.rope_parameters, model.head_dim, model.max_position_embeddings)
        declare(self, heads.parameters, "gdn.", dtype)

    def forward(
        self,
        inputs: GatedDeltaNetInputs,
        packed: PackedSequence,
        tied_norms: QkNorms = (None, None),
    ) -> torch.Tensor:
        """Run the recurrence.

        Args:
            inputs: projections.
            packed: documents and shard.
            tied_norms: weights of the QK-norms that both branches share, instead of separate ones.

        Returns:
            ``[T_local, n, d]``, before the gate.
        """
        n, (qkv, b, a, _) = self.num_heads, inputs
        tables = None
        if self.switches.gdn_position == "rope":
            tables = self.rotary.tables(packed.positions_local, packed)
        kv_heads = (qkv.shape[1] // self.head_dim - n) // 2
        conv = halo = None
        if self.conv is not None:
            conv = self._conv_weight(n * self.head_dim, kv_heads * self.head_dim)
            halo = convolution_halo(qkv, conv.shape[1], self.cp_group)
        q, k, v = self.kernels.delta_rule_inputs(
            qkv,
            (n, kv_heads),
            conv,
            packed.positions_local,
            halo,
            tied_norms if self.switches.ties_qkv else (self.q_norm, self.k_norm),
            self.eps,
            tables,
        )
        a_log, dt_bias = leading(self.A_log, n), leading(self.dt_bias, a.shape[1])
        gates = self.kernels.delta_rule_gates
        if self.decays_of_head:  # every channel counts as a head, with the A_log of its head
            gates, a_log = delta_rule_gates, a_log.repeat_interleave(self.head_dim)
        log_alpha, beta = gates(a, b, a_log, dt_bias)
        log_alpha = log_alpha.view(-1, n, *self.decays_of_head)
        if self.switches.fa_window is not None:
            k, v, log_alpha, beta = self._beyond_window(k, v, log_alpha, beta, packed)
        if self.kv_of_heads != tuple(range(n)):
            index = int_tensor(self.kv_of_heads, torch.int64, k.device)
            k, v = k.index_select(1, index), v.index_select(1, index)
        output, _ = self.kernels.delta_rule(
            q,
            k,
            v,
            log_alpha,
            beta,
            packed.local_cu_seqlens,
            exchange=state_exchange(packed, self.cp_group),
        )
        return output

    def _beyond_window(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        log_alpha: torch.Tensor,
        beta: torch.Tensor,
        packed: PackedSequence,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A token is written when it leaves the window of the softmax, so the state has all earlier tokens.
        Before the first token leaves, nothing is written (β = 0) and nothing decays (α = 1).
        """
        window = self.switches.window
        kv = delayed(torch.cat((k, v), dim=-1), window, packed, self.cp_group)
        gates = torch.cat((log_alpha.flatten(1), beta), dim=1)
        sizes = (gates.shape[1] - beta.shape[1], beta.shape[1])
        log, beta = delayed(gates, window, packed, self.cp_group).split(sizes, dim=1)
        k, v = kv.split((self.head_dim, self.head_dim), dim=-1)
        return k, v, log.view_as(log_alpha), beta

    def _conv_weight(self, q_channels: int, kv_channels: int) -> torch.Tensor:
        """Kernels ``[C, W]`` of the local q, k and v channels, shared KV groups last in k and in v."""
        assert self.conv is not None
        if not self.shared_kv:
            return leading(self.conv, q_channels + 2 * kv_channels)
        own = kv_channels - len(self.shared_kv) * self.head_dim
        of_q, of_k, of_v = self.conv[: q_channels + 2 * own].split((q_channels, own, own))
        assert self.shared_conv is not None
        shared = self.shared_conv.view(2, -1, self.head_dim, self.shared_conv.shape[1])
        index = int_tensor(self.shared_kv, torch.int64, shared.device)
        shared = shared.index_select(1, index).flatten(1, 2)
        return torch.cat((of_q, of_k, shared[0], of_v, shared[1]))
