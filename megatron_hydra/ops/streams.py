"""Two independent pieces of work on two CUDA streams, so that one fills the gaps of the other.

The scan of a few GDN heads keeps a fraction of the multiprocessors busy, and so do the last waves of
an attention kernel. Autograd runs every backward on the stream of its forward, so the backwards
overlap too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


@functools.lru_cache(maxsize=16)
def _side_stream(index: int) -> torch.cuda.Stream:
    """One side stream a device: its memory pool is shared by all layers."""
    return torch.cuda.Stream(index)


def side_by_side(
    aside: Callable[[], torch.Tensor], here: Callable[[], torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(aside(), here())``, on a GPU at the same time.

    Args:
        aside: runs on the side stream. What it reads must be ready on the current stream by now and
            stay referenced until this returns; what it caches must be read aside only.
        here: runs on the current stream.
        device: where both compute; anything but a GPU runs them one after the other.

    Returns:
        Both results, ready on the current stream.
    """
    if device.type != "cuda":
        return aside(), here()
    current, side = torch.cuda.current_stream(device), _side_stream(torch.cuda.current_device())
    side.wait_stream(current)
    with torch.cuda.stream(side):
        first = aside()
    second = here()
    current.wait_stream(side)
    # Made in the side stream's pool, used here: not to be handed out again before that is done.
    first.record_stream(current)
    return first, second
