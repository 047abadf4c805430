"""Host integers as device tensors, made once: layers of a model share them and none waits."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=256)
def int_tensor(
    values: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """``values`` on ``device``, the same tensor object for the same arguments.

    Building a tensor from host integers copies from pageable memory, which stalls the host until the
    device has caught up; in every layer, that would be a synchronisation per layer.

    Args:
        values: document boundaries, head indices and the like.
        dtype: int32 or int64.
        device: where to.

    Returns:
        ``[len(values)]``; shared, so never write to it.
    """
    tensor = torch.tensor(values, dtype=dtype).to(device)
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()  # once; any stream may read it now
    return tensor
