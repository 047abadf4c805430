"""Run two independent functions on two CUDA streams, so that one fills the gaps of the other.

The scan of a few GDN heads uses a fraction of the multiprocessors, and so do the last waves of an attention
kernel. Autograd runs every backward on the stream of its forward, so backwards overlap, too.

Memory belongs to the stream that allocated it: after the host frees it, this stream may get it again at once.
So no tensor may be freed while the other stream still reads it (:func:`held`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return grads


def held(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The tensors; their memory is not freed before the gradients of all of them have been computed.

    Autograd frees a node's saved tensors as soon as the host has launched its backward. If this backward runs
    on another stream than the one that allocated a tensor, its memory could be reused before it is read. The
    node made here keeps it. Its own backward runs when the current stream waits for the gradients of all these
    tensors, and so for everything that computes them.

    Args:
        tensors: views of them are returned; their consumers must not change them in place.
    """
    result: tuple[torch.Tensor, ...] = _Held.apply(*tensors)
    return result


@functools.lru_cache(maxsize=16)
def _side_stream(index: int) -> torch.cuda.Stream:
    """One side stream for each device; all layers share its memory pool."""
    return torch.cuda.Stream(index)


def side_by_side(
    aside: Callable[..., torch.Tensor],
    reads: tuple[torch.Tensor, ...],
    here: Callable[[], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(aside(*reads), here())``, on a GPU at the same time.

    Args:
        aside: runs on the side stream. Of the current stream's tensors that could be freed before the end of
            the backward, it reads only ``reads``. Only the side stream may read what it caches.
        reads: at least one tensor, ready on the current stream. Both functions compute on its device; without a
            GPU they run one after the other.
        here: runs on the current stream.

    Returns:
        Both results, ready on the current stream.
    """
    device = reads[0].device
    if device.type != "cuda":
        return aside(*reads), here()
    current, side = torch.cuda.current_stream(device), _side_stream(torch.cuda.current_device())
    if torch.is_grad_enabled():
        for x in reads:
            if not x.requires_grad:  # no gradient to wait for
                x.record_stream(side)
        reads = held(reads)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        first = aside(*reads)
    second = here()
    current.wait_stream(side)
    # It is from the side stream's pool and used here, so the pool must not reuse it before the use ends.
    first.record_stream(current)
    return first, second
