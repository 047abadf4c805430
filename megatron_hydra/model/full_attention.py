"""The full-attention branch of a HydraHead layer: q, k, v in, head outputs out (design §2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.model.local_heads import LocalHeads
from megatron_hydra.model.local_parameters import declare
from megatron_hydra.model.norm import QkNorms
from megatron_hydra.model.rotary import Rotary
from megatron_hydra.ops.backends import Kernels
from megatron_hydra.ops.device_cache import int_tensor
from megatron_hydra.parallel.context_parallel import sharded_attention
from megatron_hydra.parallel.packed_sequence import PackedSequence
from megatron_hydra.parallel.token_window import windowed_attention


class FullAttentionInputs(NamedTuple):
    """Inputs of a rank's FA heads, for the tokens that it computes.

    Attributes:
        qk: ``[T, (n + g)·d]``, the heads of q, then k of the KV groups that they read.
        v: ``[T, g·d]`` of the same groups.
        gate: ``[T, n·d]`` logits of the output gate, or ``None``.
    """

    qk: torch.Tensor
    v: torch.Tensor
    gate: torch.Tensor | None = None


class FullAttention(torch.nn.Module):
    """Softmax attention of this rank's FA heads.

    Args:
        model: shapes and switches.
        heads: the rank's heads, and the local KV head of each (:attr:`.LocalHeads.fa_kv_of_heads`).
        dtype: parameter dtype.
        kernels: the chosen implementations.
    """

    q_norm: torch.nn.Parameter | None
    k_norm: torch.nn.Parameter | None

    def __init__(
        self,
        model: ModelConfig,
        heads: LocalHeads,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.head_dim, self.eps = model.head_dim, model.norm_eps
        self.switches = model.switches
        self.rotates = model.switches.fa_rotates(heads.layer)
        self.kernels = kernels
        self.groups_of_heads = heads.fa_kv_of_heads
        self.rotary = Rotary(model.rope_parameters, model.head_dim, model.max_position_embeddings)
        declare(self, heads.parameters, "fa.", dtype)

    def forward(
        self,
        qk: torch.Tensor,
        v: torch.Tensor,
        packed: PackedSequence,
        sequence_group: dist.ProcessGroup,
        positions: torch.Tensor,
        tied_norms: QkNorms = (None, None),
    ) -> torch.Tensor:
        """Compute attention.

        Args:
            qk: ``[T_shard, (n + g)·d]``, the shard of ``sequence_group.rank()``.
            v: ``[T_shard, g·d]``.
            packed: documents of the stream.
            sequence_group: ranks that share the sequence.
            positions: ``[T_shard]`` of these tokens in their documents.
            tied_norms: weights of the QK-norms that both branches share, instead of separate ones.

        Returns:
            ``[T_shard, n, d]``, before the gate.
        """
        qk, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (qk, v))
        tables = scale = None
        if self.rotates:
            tables = self.rotary.tables(positions, packed)
        if self.switches.scales_queries:
            a, window = self.switches.log_scale_a, self.switches.fa_window
            scale = packed.cached(
                ("log-scale", a, window, positions.data_ptr(), len(positions)),
                lambda: packed.log_scale(a, positions, window),
            )
        norms = tied_norms if self.switches.ties_qkv else (self.q_norm, self.k_norm)
        q, k = self.kernels.prepare_queries_and_keys(
            qk, v.shape[1], norms, self.eps, tables, scale, False
        )
        k, v = self._grouped(k), self._grouped(v)
        attention, window = self.kernels.attention, self.switches.fa_window
        if window is not None:
            return windowed_attention(q, k, v, packed, sequence_group, attention, window)
        return sharded_attention(q, k, v, packed, sequence_group, attention)

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """KV heads for which query head i reads KV head i·g/n: unchanged, or one for each query head."""
        heads, groups = len(self.groups_of_heads), x.shape[1]
        if heads % groups == 0 and self.groups_of_heads == tuple(
            i // (heads // groups) for i in range(heads)
        ):
            return x
        return x.index_select(1, int_tensor(self.groups_of_heads, torch.int64, x.device))
