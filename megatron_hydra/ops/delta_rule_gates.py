"""From logits to the decay α and the write strength β of the gated delta rule (design §2).

On a GPU one Triton kernel computes them (:mod:`megatron_hydra.ops.triton_delta_rule_gates`). This module is its
torch twin, the CPU path.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def delta_rule_gates(
    a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log α = −exp(A_log) · softplus(a + dt_bias), β = σ(b).

    Args:
        a, b: ``[T, n]`` logits; any strides with contiguous heads.
        a_log, dt_bias: ``[n]`` of the heads.

    Returns:
        Log α and β, ``[T, n]`` in fp32 (fp64 for fp64).
    """
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    dt = F.softplus(a.to(wide) + dt_bias.to(wide))
    return -a_log.to(wide).exp() * dt, torch.sigmoid(b.to(wide))
