"""The loss of ``align`` against autograd over plain operators."""

from __future__ import annotations

import pytest
import torch

from megatron_hydra.ops.squared_error import squared_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_and_gradient_are_those_of_autograd(dtype):
    torch.manual_seed(0)
    output = torch.randn(9, 12).to(dtype).requires_grad_()
    target, mask = torch.randn(9, 12).to(dtype), torch.rand(9) < 0.6
    squared = (output.float() - target.float()).square().mean(dim=-1)
    loss = torch.where(mask, squared, 0).sum()
    (expected,) = torch.autograd.grad(loss, output)
    found, gradient = squared_error(output, target, mask)
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(gradient, expected)
    assert gradient.dtype == dtype
    assert not found.requires_grad


def test_what_a_masked_token_holds_reaches_nothing():
    output, target = torch.ones(3, 4), torch.zeros(3, 4)
    output[1] = float("nan")
    loss, gradient = squared_error(output, target, torch.tensor([True, False, True]))
    assert loss == 2.0
    assert torch.equal(gradient, torch.tensor([0.5, 0.0, 0.5])[:, None].expand(3, 4))
