"""Two branches on two streams give the results of one stream, however slow the side stream is."""

from __future__ import annotations

import weakref

import pytest
import torch

from megatron_hydra.ops import streams

SLEEP_CYCLES = 400_000_000
"""About 0.2 s of a GPU's clock: far longer than the host needs for the next calls."""


class SlowSquare(torch.autograd.Function):
    """x², whose backward reads ``x`` only after a sleep of its stream."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        if x.is_cuda:
            torch.cuda._sleep(SLEEP_CYCLES)
        return gradient * 2 * x


class Overwriting(torch.autograd.Function):
    """The identity, whose backward allocates and fills all free memory of its stream's pool."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        rubbish = [torch.full_like(gradient, float("nan")) for _ in range(8)]
        del rubbish
        return gradient


def two_branches(x: torch.Tensor, side_by_side) -> torch.Tensor:
    """The side branch reads two tensors of the main stream. Its backward finishes with the second one at once.
    So work of the main stream follows while it still reads the first.
    """
    reads = x * 1.5, Overwriting.apply(x)

    def aside(slow: torch.Tensor, quick: torch.Tensor) -> torch.Tensor:
        squared = SlowSquare.apply(slow)  # first in the forward, so last in the backward
        return squared + quick.exp()

    first, second = side_by_side(aside, reads, x.sin)
    return (first + second).sum()  # from here on, only the graph holds the other tensors


def one_after_the_other(aside, reads, here):
    return aside(*reads), here()


def gradient_of_two_branches(x: torch.Tensor, side_by_side) -> torch.Tensor:
    """The gradient by ``x``, after all streams have finished."""
    two_branches(x, side_by_side).backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_the_side_branch_reads_is_not_overwritten_in_the_backward(device):
    generator = torch.Generator(device).manual_seed(0)
    size = 1 << 22 if device == "cuda" else 16
    x = torch.randn(size, generator=generator, device=device)
    expected, found = (
        gradient_of_two_branches(x.clone().requires_grad_(), how)
        for how in (one_after_the_other, streams.side_by_side)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
def test_the_race_that_holding_prevents_is_real(monkeypatch):
    monkeypatch.setattr(streams, "held", lambda tensors: tensors)
    x = torch.randn(1 << 22, device="cuda", requires_grad=True)
    assert gradient_of_two_branches(x, streams.side_by_side).isnan().any()


def test_held_memory_is_freed_once_all_gradients_have_come_back():
    events = []

    class Made(torch.autograd.Function):
        """A tensor whose memory reports when it is freed."""

        @staticmethod
        def forward(ctx, x):
            memory = x.numpy() * 1.5
            weakref.finalize(memory, events.append, "freed")
            return torch.from_numpy(memory)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.5

    def loss(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        slow, quick = streams.held((Made.apply(x), other * 2))
        slow.register_hook(lambda _: events.append("gradient of the first"))
        quick.register_hook(lambda _: events.append("gradient of the second"))
        return (SlowSquare.apply(slow) + quick.exp()).sum()

    x, other = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    total = loss(x, other)
    assert not events
    total.backward()
    assert sorted(events[:2]) == ["gradient of the first", "gradient of the second"]
    assert events[2:] == ["freed"]
    torch.testing.assert_close(x.grad, 2 * 1.5**2 * x.detach())
    torch.testing.assert_close(other.grad, 2 * (2 * other.detach()).exp())


def test_held_passes_on_what_has_no_gradient():
    x, constant = torch.randn(3, requires_grad=True), torch.ones(3)
    held_x, held_constant = streams.held((x, constant))
    (held_x * held_constant).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3))
    assert constant.grad is None
