"""The loss of ``align`` and its gradient: squared differences, averaged over channels, summed over tokens."""

from __future__ import annotations

import importlib.util

import torch


def squared_error(
    output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, fused: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_t mask_t · mean over channels (output_t − target_t)², and its gradient by ``output``.

    Args:
        output, target: ``[T, D]``. Values of masked tokens are not read; they may be NaN.
        mask: ``[T]`` bool.
        fused: whether one Triton kernel computes it; ``None``: on a GPU if Triton is installed.

    Returns:
        The sum, an fp32 scalar, and the gradient ``[T, D]`` in ``output``'s dtype.
    """
    output, target = output.detach(), target.detach()
    if fused is None:
        fused = output.is_cuda and importlib.util.find_spec("triton") is not None
    if fused:
        from megatron_hydra.ops import triton_squared_error

        rows, gradient = triton_squared_error.squared_error(output, target, mask)
        return rows.sum(), gradient
    wide = torch.where(mask[:, None], output.float() - target.float(), 0)
    gradient = (wide * (2 / output.shape[1])).to(output.dtype)
    return wide.square().mean(dim=-1).sum(), gradient
