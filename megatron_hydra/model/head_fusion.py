"""Fusion of a layer's heads: gate, norm over each head's channels, scale γ (design §2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_hydra.model.local_heads import LocalHeads
from megatron_hydra.model.local_parameters import declare, leading
from megatron_hydra.model.recomputation import Recomputation
from megatron_hydra.ops.backends import Kernels
from megatron_hydra.ops.device_cache import int_tensor
from megatron_hydra.ops.fusion_tail import Branch
from megatron_hydra.parallel.context_parallel import gather_sequence


class HeadFusion(torch.nn.Module):
    """Õ_h = γ_h · RMSNorm(o_h ⊙ 2σ(gate_h)) of this rank's heads.

    Args:
        heads: the rank's heads.
        dtype: of parameters.
        kernels: the chosen implementations.
        recompute: of the part ``tail``.
        tp_group: tensor-parallel ranks.
    """

    gamma: torch.nn.Parameter | None
    fa_gamma: torch.nn.Parameter | None
    gate: torch.nn.Parameter | None

    def __init__(
        self,
        heads: LocalHeads,
        dtype: torch.dtype,
        kernels: Kernels,
        recompute: Recomputation,
        tp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__()
        self.heads, self.kernels, self.recompute, self.tp_group = (
            heads,
            kernels,
            recompute,
            tp_group,
        )
        self.model = heads.model
        self.eps = self.model.norm_eps if self.model.switches.fusion_norm == "rms" else None
        declare(self, heads.parameters, "fusion.", dtype)

    def shares(self, x_slice: torch.Tensor | None) -> torch.Tensor | None:
        """Gated competition: H · softmax over all heads of W_f x, ``[T_local, H]`` on every rank.

        If every head is both FA and GDN, its two outputs compete: 2σ(W_f x) and 2σ(−W_f x), ``[T_local, 2H]``.
        ``None`` for any other fusion.

        Args:
            x_slice: ``[T_local/TP, D]``, this tensor-parallel rank's slice of the layer's input.
        """
        if self.gate is None or x_slice is None:
            return None
        logits = F.linear(x_slice, self.gate).float()
        if self.heads.mixed:
            shares = 2.0 * torch.sigmoid(torch.cat((logits, -logits), dim=-1))
        else:
            shares = logits.softmax(-1) * self.model.num_query_heads
        return gather_sequence(shares, self.tp_group)

    def forward(self, branches: Sequence[Branch], shares: torch.Tensor | None) -> torch.Tensor:
        """Fuse the heads that only this rank has, ``[T_local, n·d]``.

        Args:
            branches: outputs ``[T_local, n, d]`` of FA heads, of GDN heads, and their gates' logits.
            shares: see :meth:`shares`.
        """
        scale = None
        if self.gamma is not None:
            outputs = self.heads.sharded
            if self.heads.mixed:
                outputs = (*outputs, *(self.model.num_query_heads + h for h in outputs))
            scale = leading(self.gamma, len(outputs))
            scale = scale if shares is None else scale * _of_heads(shares, outputs)
        fused = self.tail(branches, scale)
        if self.heads.mixed:  # the two outputs of every head
            fused = fused.unflatten(1, (2, -1)).sum(1)
        return fused

    def on_slice(self, branch: Branch, shares: torch.Tensor | None) -> torch.Tensor:
        """Fuse the FA heads that every rank has, ``[T_local/TP, m·d]``; arguments as for :meth:`forward`."""
        scale: torch.Tensor | None = self.fa_gamma
        if scale is not None and shares is not None:
            length = shares.shape[0] // self.tp_group.size()
            own = shares[self.heads.rank * length : (self.heads.rank + 1) * length]
            scale = scale * _of_heads(own, self.heads.replicated_fa)
        return self.tail([branch], scale)

    def tail(self, branches: Sequence[Branch], scale: torch.Tensor | None) -> torch.Tensor:
        """Gate, norm and scale of the branches' heads, joined: ``[T, n·d]``."""
        shaped: list[Branch] = [
            (output, None if gate is None else gate.unflatten(-1, (-1, self.model.head_dim)))
            for output, gate in branches
        ]
        fused: torch.Tensor = self.recompute(
            "tail", self.kernels.fusion_tail, shaped, scale, self.eps
        )
        return fused


def _of_heads(shares: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    return shares.index_select(1, int_tensor(tuple(heads), torch.int64, shares.device))
