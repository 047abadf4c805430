"""The small kernels of a layer between vLLM's own: fused in 16 bits on a GPU, their torch twins elsewhere."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from megatron_hydra.ops import delta_rule_gates, fusion_tail, qk_preparation

Pair = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class LayerKernels:
    """Kernels that an attention layer calls.

    Attributes:
        prepare_queries_and_keys: as :func:`~megatron_hydra.ops.qk_preparation.prepare_queries_and_keys`.
        delta_rule_gates: as :func:`~megatron_hydra.ops.delta_rule_gates.delta_rule_gates`.
        fusion_tail: as :func:`~megatron_hydra.ops.fusion_tail.fusion_tail`.
    """

    prepare_queries_and_keys: Pair
    delta_rule_gates: Pair
    fusion_tail: Callable[..., torch.Tensor]


TORCH = LayerKernels(
    qk_preparation.prepare_queries_and_keys,
    delta_rule_gates.delta_rule_gates,
    fusion_tail.fusion_tail,
)


@functools.cache
def _fused() -> LayerKernels:
    from megatron_hydra.ops import (
        triton_delta_rule_gates,
        triton_fusion_tail,
        triton_qk_preparation,
    )

    return LayerKernels(
        triton_qk_preparation.prepare_queries_and_keys,
        triton_delta_rule_gates.delta_rule_gates,
        triton_fusion_tail.fusion_tail,
    )


def layer_kernels(x: torch.Tensor) -> LayerKernels:
    """The kernels for a layer whose activations are like ``x``."""
    fused = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return _fused() if fused else TORCH
