"""RMSNorm as a layer-spec module, and the pair of QK-norms."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hydra.ops.rms_norm import weighted_rms_norm

QkNorms = tuple[torch.nn.Parameter | None, torch.nn.Parameter | None]
"""Weights ``[d]`` of the RMSNorms of q and of k; ``None`` without QK-norm."""


class RMSNorm(torch.nn.Module):
    """RMSNorm with a weight, for Megatron-Core layer specs.

    Megatron's own torch norm refuses sequence parallelism. This norm marks its weight, so that
    ``finalize_model_grads`` sums the gradient over the tensor-parallel ranks.

    Args:
        config: has the parameter dtype and the sequence-parallel flag.
        hidden_size: D.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[…, D]`` → ``[…, D]``."""
        return weighted_rms_norm(x, self.weight, self.eps)
