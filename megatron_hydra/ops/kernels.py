"""The kernels that a model's layers call, and the case for which they are chosen (design §7)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch

from megatron_hydra.ops import (
    delta_rule_gates,
    delta_rule_inputs,
    fusion_tail,
    qk_preparation,
)
from megatron_hydra.ops.linear_rules import GATED_DELTA_RULE, LinearRule
from megatron_hydra.ops.varlen_attention import varlen_attention

FLA_BACKENDS = ("fla", "fla_cp")
"""Names of ``backend.gated_delta_net`` that run flash-linear-attention."""

Kernel = Callable[..., torch.Tensor]
DeltaRuleInputs = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
Pair = Callable[..., tuple[torch.Tensor, torch.Tensor]]
DeltaRule = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Make a tensor's GPU the current one inside the block: Triton launches there, whatever its arguments."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels that a model's layers call; by default the torch twins.

    Attributes:
        attention: as :func:`~megatron_hydra.ops.varlen_attention.varlen_attention`.
        delta_rule: as the twin of the model's rule (:attr:`.LinearRule.twin`); may return ``None`` for the
            final states.
        prepare_queries_and_keys: as :func:`~megatron_hydra.ops.qk_preparation.prepare_queries_and_keys`.
        delta_rule_inputs: as :func:`~megatron_hydra.ops.delta_rule_inputs.delta_rule_inputs`.
        delta_rule_gates: as :func:`~megatron_hydra.ops.delta_rule_gates.delta_rule_gates`.
        fusion_tail: as :func:`~megatron_hydra.ops.fusion_tail.fusion_tail`.
        names: key of the ``backend`` section -> chosen back end; for logs and the self-check.
    """

    attention: Kernel = varlen_attention
    delta_rule: DeltaRule = GATED_DELTA_RULE.twin
    prepare_queries_and_keys: Pair = qk_preparation.prepare_queries_and_keys
    delta_rule_inputs: DeltaRuleInputs = delta_rule_inputs.delta_rule_inputs
    delta_rule_gates: Pair = delta_rule_gates.delta_rule_gates
    fusion_tail: Kernel = fusion_tail.fusion_tail
    names: dict[str, str] = dataclasses.field(
        default_factory=lambda: {
            "full_attention": "torch", "gated_delta_net": "torch", "fused_kernels": "torch"
        }
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """The case for which kernels are chosen.

    Attributes:
        device: where the model runs.
        dtype: of its activations.
        head_dim: d.
        windowed: whether attention has a window of tokens.
        gdn_heads: the different numbers of GDN heads of its layers on this rank. FLA compiles its kernels for
            each number again, so the start-up check tests each number.
        context_parallel: whether ranks share a sequence; the start-up check then runs the delta rule's shards.
        gdn_rotary: whether q and k of GDN heads are rotated.
        rule: of its linear heads.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    windowed: bool = False
    gdn_heads: tuple[int, ...] = (2,)
    context_parallel: bool = False
    gdn_rotary: bool = True
    rule: LinearRule = GATED_DELTA_RULE
