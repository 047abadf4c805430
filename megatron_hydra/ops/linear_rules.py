"""The recurrences of heads without full attention, described once for all who choose, check and plan kernels.

The torch twin of every rule is :func:`~megatron_hydra.ops.gated_delta_rule.chunked_gated_delta_rule`. What
tells rules apart on a GPU stands here: FLA's function, the shape of the decays, the work.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_hydra.config.model import HydraConfig

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
class LinearRule:
    """A recurrence of linear heads.

    Attributes:
        title: what messages call it.
        fla_module, fla_function: where flash-linear-attention has its chunked kernels.
        fla_launches: kernels of FLA 0.6.0 in forward and backward; under context parallelism three more
            each way.
        flash_qla_head_dim: the only head dimension for which FLA hands the rule to FlashQLA; ``None``: it
            never does.
        decays_by_channel: whether each channel of a key has a decay of its own, or one is for the head.
        flops: forward FLOPs of one head, of (tokens, head dimension).
    """

    title: str
    fla_module: str
    fla_function: str
    fla_launches: tuple[int, int]
    flash_qla_head_dim: int | None
    decays_by_channel: bool
    flops: Callable[[int, int], int]

    def decays_of_head(self, head_dim: int) -> tuple[int, ...]:
        """Shape of what one token decays a head by; log α is ``[T, H, *this]``."""
        return (head_dim,) if self.decays_by_channel else ()

    def fla_kernel(self) -> Callable[..., Any]:
        """FLA's chunked kernels (imports FLA)."""
        kernel: Callable[..., Any] = getattr(
            importlib.import_module(self.fla_module), self.fla_function
        )
        return kernel


GATED_DELTA_RULE = LinearRule(
    title="gated delta rule",
    fla_module="fla.ops.gated_delta_rule",
    fla_function="chunk_gated_delta_rule",
    fla_launches=(4, 7),
    flash_qla_head_dim=128,
    decays_by_channel=False,
    flops=gated_delta_net_flops,
)

KIMI_DELTA_ATTENTION = LinearRule(
    title="Kimi delta attention",
    fla_module="fla.ops.kda",
    fla_function="chunk_kda",
    fla_launches=(6, 7),
    flash_qla_head_dim=None,
    decays_by_channel=True,
    flops=gated_delta_net_flops,
)
"""Its products are those of the gated delta rule; weights of channels in place of pairs are omitted."""

RULES = {"gdn": GATED_DELTA_RULE, "kda": KIMI_DELTA_ATTENTION}
"""By value of ``hydra.linear``."""


def rule_of_model(switches: HydraConfig) -> LinearRule:
    """The rule of a model's linear heads."""
    return RULES[switches.linear]


def rule_of_decays(log_alpha: torch.Tensor) -> LinearRule:
    """The rule that has decays of this shape."""
    axes = log_alpha.ndim - 2
    return next(rule for rule in RULES.values() if len(rule.decays_of_head(1)) == axes)
