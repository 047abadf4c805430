"""The recurrences of heads without full attention, each declared once.

The table of parameters, the choice of kernels, the start-up check, the count of FLOPs and the planner read
these declarations. None of them names a rule.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_hydra.config.model import HydraConfig
from megatron_hydra.ops.gated_delta_rule import chunked_gated_delta_rule

CHUNK = 64
"""Chunk length that the work of a rule is counted at, that of the GPU kernels."""


def gated_delta_net_flops(length: int, head_dim: int, chunk: int = CHUNK) -> int:
    """One GDN head over ``length`` tokens, chunked (see :mod:`megatron_hydra.ops.gated_delta_rule`).

    Per token: K Kᵀ and Q Kᵀ (2·2·C·d), the triangular solve for W and U (C·2d), P applied to them
    (2·C·d), and four products with d×d states (8·d²).
    """
    per_token = 4 * chunk * head_dim + 2 * chunk * head_dim + 2 * chunk * head_dim + 8 * head_dim**2
    return length * per_token


@dataclasses.dataclass(frozen=True)
class FlaKernels:
    """How flash-linear-attention computes a rule. Counts are those of FLA 0.6.0.

    Attributes:
        module, function: where its chunked kernels are.
        launches: Triton kernels in forward and backward.
        shard_launches: how many more a context-parallel shard runs, forward and backward.
        exchanges_states: FLA's own context parallelism passes the states between shards. Otherwise our kernels
            of shards do (:mod:`.fla_shard_kernels`, :mod:`.flash_qla_shard_kernels`).
        flash_qla_head_dim: the only head dimension for which FLA gives the rule to FlashQLA; ``None``: it
            never does.
        kept_squares: ``[C, C]`` matrices of a chunk of C tokens that the backward needs.
        forward_rows: tensors of q's size that the forward makes beside the output.
        fp32_gradients: gradients of q's size that the backward makes in fp32.
    """

    module: str
    function: str
    launches: tuple[int, int]
    shard_launches: tuple[int, int]
    exchanges_states: bool
    flash_qla_head_dim: int | None
    kept_squares: int
    forward_rows: int
    fp32_gradients: int

    def load(self) -> Callable[..., Any]:
        """The chunked kernels (imports FLA)."""
        kernel: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return kernel


@dataclasses.dataclass(frozen=True)
class LinearRule:
    """A recurrence of linear heads.

    Attributes:
        title: what messages call it.
        decays_by_channel: whether each channel of a key has its own decay. Otherwise a head has one decay.
        flops: forward FLOPs of one head, of (tokens, head dimension).
        twin: the rule in torch, with the arguments and results of
            :func:`~megatron_hydra.ops.gated_delta_rule.chunked_gated_delta_rule`.
        fla: FLA's kernels of the rule; ``None``: FLA has none, and the twin computes it on a GPU too.
    """

    title: str
    decays_by_channel: bool
    flops: Callable[[int, int], int]
    twin: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    fla: FlaKernels | None

    def decays_of_head(self, head_dim: int) -> tuple[int, ...]:
        """Shape of what one token decays a head by; log α is ``[T, H, *this]``."""
        return (head_dim,) if self.decays_by_channel else ()


GATED_DELTA_RULE = LinearRule(
    title="gated delta rule",
    decays_by_channel=False,
    flops=gated_delta_net_flops,
    twin=chunked_gated_delta_rule,
    fla=FlaKernels(
        module="fla.ops.gated_delta_rule",
        function="chunk_gated_delta_rule",
        launches=(4, 7),
        shard_launches=(2, 1),
        exchanges_states=False,
        flash_qla_head_dim=128,
        kept_squares=1,  # the inverse of I + A
        forward_rows=3,  # W, U, the new values
        fp32_gradients=0,
    ),
)

KIMI_DELTA_ATTENTION = LinearRule(
    title="Kimi delta attention",
    decays_by_channel=True,
    # The products are those of the gated delta rule. Weights of channels in place of pairs are omitted.
    flops=gated_delta_net_flops,
    twin=chunked_gated_delta_rule,
    fla=FlaKernels(
        module="fla.ops.kda",
        function="chunk_kda",
        launches=(6, 7),
        shard_launches=(3, 3),
        exchanges_states=True,
        flash_qla_head_dim=None,
        kept_squares=2,  # the inverse of I + A, and P
        forward_rows=4,  # W, U, the new values, the weighted keys
        fp32_gradients=3,  # by q, k and log α
    ),
)

RULES = {"gdn": GATED_DELTA_RULE, "kda": KIMI_DELTA_ATTENTION}
"""By value of ``hydra.linear``."""


def rule_of_model(switches: HydraConfig) -> LinearRule:
    """The rule of a model's linear heads."""
    return RULES[switches.linear]
