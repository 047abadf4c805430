"""Two branches on two streams give what one stream gives, however slow the side stream is."""

from __future__ import annotations

import pytest
import torch

from megatron_hydra.ops import streams

SLEEP_CYCLES = 400_000_000
"""Some 0.2 s of a GPU's clock: far longer than the host needs for what follows."""


class SlowSquare(torch.autograd.Function):
    """x², whose backward reads ``x`` only after a sleep of its stream."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        torch.cuda._sleep(SLEEP_CYCLES)
        return gradient * 2 * x


class Overwriting(torch.autograd.Function):
    """The identity, whose backward takes and fills all the memory of its stream's pool that it can have."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        rubbish = [torch.full_like(gradient, float("nan")) for _ in range(8)]
        del rubbish
        return gradient


def two_branches(x: torch.Tensor, side_by_side) -> torch.Tensor:
    """The side branch reads two tensors of the main stream. Its backward is done with the second one at
    once, so that work of the main stream follows while it still reads the first.
    """
    slow, quick = x * 1.5, Overwriting.apply(x)

    def aside() -> torch.Tensor:
        squared = SlowSquare.apply(slow)  # first here, so last in the backward
        return squared + quick.exp()

    first, second = side_by_side(aside, x.sin, x.device)
    return (first + second).sum()  # nothing but the graph holds the rest from here on


def gradient_of_two_branches(x: torch.Tensor, side_by_side) -> torch.Tensor:
    """The gradient by ``x``, once all streams are done."""
    two_branches(x, side_by_side).backward()
    torch.cuda.synchronize()
    assert x.grad is not None
    return x.grad


@pytest.mark.gpu
def test_what_the_side_branch_reads_is_not_overwritten_in_the_backward():
    def one_after_the_other(aside, here, _device):
        return aside(), here()

    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(1 << 22, generator=generator, device="cuda")
    expected, found = (
        gradient_of_two_branches(x.clone().requires_grad_(), how)
        for how in (one_after_the_other, streams.side_by_side)
    )
    torch.testing.assert_close(found, expected)
