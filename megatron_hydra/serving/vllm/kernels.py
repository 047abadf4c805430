"""The small kernels of a layer between vLLM's own: fused in 16 bits on a GPU, their torch twins elsewhere."""

from __future__ import annotations

import functools

import torch

from megatron_hydra.ops.backends import load_triton
from megatron_hydra.ops.kernels import Kernels

TORCH = Kernels()


@functools.cache
def _fused() -> Kernels:
    return Kernels(**load_triton())


def layer_kernels(x: torch.Tensor) -> Kernels:
    """The kernels for a layer whose activations are like ``x``.

    A layer calls three of them: q/k preparation, the delta rule's gates and the fusion tail. Attention, delta
    rule and convolution are vLLM's, or :class:`.GatedDeltaNet`'s own.
    """
    fused = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return _fused() if fused else TORCH
