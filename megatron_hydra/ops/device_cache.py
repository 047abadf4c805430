"""Host integers as device tensors. They are made once; layers of a model share them, and none waits."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=256)
def int_tensor(
    values: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """``values`` on ``device``, the same tensor object for the same arguments.

    Making a tensor from host integers copies from pageable memory, and the host waits until the device has
    caught up. Without a cache, this would be a synchronisation in every layer.

    Args:
        values: document boundaries, head indices and the like.
        dtype: int32 or int64.
        device: of the tensor.

    Returns:
        ``[len(values)]``; callers share it and must not write to it.
    """
    tensor, device = torch.tensor(values, dtype=dtype), torch.device(device)
    return tensor.to(device) if device.type != "cuda" else _copy_aside(tensor, device)


def _copy_aside(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to a GPU on a stream of its own.

    The host waits for the copy, so any stream may read it then. It does not wait for work that it launched
    before.
    """
    stream = _copies(device.index if device.index is not None else torch.cuda.current_device())
    with torch.cuda.stream(stream):
        copied = tensor.pin_memory().to(device, non_blocking=True)
    stream.synchronize()
    # After the cache drops it, its memory is reused only when the current stream has read it.
    copied.record_stream(torch.cuda.current_stream(device))
    return copied


@functools.lru_cache(maxsize=16)
def _copies(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)
