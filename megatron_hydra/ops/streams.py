"""Two independent pieces of work on two CUDA streams, so that one fills the gaps of the other.

The scan of a few GDN heads keeps a fraction of the multiprocessors busy, and so do the last waves of
an attention kernel. Autograd runs every backward on the stream of its forward, so the backwards
overlap too.

Memory belongs to the stream that allocated it: once freed on the host, it may be handed out again to
that stream at once. So nothing may be freed while the other stream still reads it (:func:`held`).
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
    """The tensors, whose memory stays theirs until the gradients of all of them have come back.

    Autograd frees what a node has saved as soon as the host has launched its backward. Where that runs
    on another stream than the one that allocated the tensor, the memory could be used again before
    it has been read. The node made here keeps it; its own backward runs when the current stream waits
    for the gradients of all these tensors, and with them for everything that made them.

    Args:
        tensors: views of them are returned; their consumers must not change them in place.
    """
    result: tuple[torch.Tensor, ...] = _Held.apply(*tensors)
    return result


@functools.lru_cache(maxsize=16)
def _side_stream(index: int) -> torch.cuda.Stream:
    """One side stream a device: its memory pool is shared by all layers."""
    return torch.cuda.Stream(index)


def side_by_side(
    aside: Callable[..., torch.Tensor],
    reads: tuple[torch.Tensor, ...],
    here: Callable[[], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(aside(*reads), here())``, on a GPU at the same time.

    Args:
        aside: runs on the side stream. Of the tensors that were made on the current stream and that
            something may free before the end of the backward, it reads no others than ``reads``; what
            it caches must be read aside only.
        reads: ready on the current stream by now, at least one; their device is where both compute, and
            anything but a GPU runs them one after the other.
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
            if not x.requires_grad:  # no gradient that could be waited for
                x.record_stream(side)
        reads = held(reads)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        first = aside(*reads)
    second = here()
    current.wait_stream(side)
    # Made in the side stream's pool, used here: not to be handed out again before that is done.
    first.record_stream(current)
    return first, second
