"""Attention of a document's last queries by two dense products equals the twin, which has a mask."""

from __future__ import annotations

import pytest
import torch

from megatron_hydra.ops import gpu_attention, tail_attention
from megatron_hydra.ops.varlen_attention import varlen_attention


def make(queries, keys, heads=4, groups=2, d=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = ((queries, heads, d), (keys, groups, d), (keys, groups, d))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (2, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(64, 192), (1, 70), (70, 71), (100, 130)])
def test_output_and_gradients_equal_the_twins(queries, keys, heads, groups):
    inputs = [x.requires_grad_() for x in make(queries, keys, heads, groups)]
    got = tail_attention.tail_attention(*inputs, tail_attention.CpuKernel())
    want = varlen_attention(*inputs, (0, queries), (0, keys))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    mine, twin = (torch.autograd.grad(y, inputs, cotangent) for y in (got, want))
    for a, b in zip(mine, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_parts_whose_logits_differ_by_hundreds_are_joined():
    """The weight of a part is then 0 or 1 in fp32, and no exponential overflows."""
    q, k, v = make(8, 40)
    k[:32] *= 100.0
    got = tail_attention.tail_attention(q, k, v, tail_attention.CpuKernel())
    torch.testing.assert_close(
        got, varlen_attention(q, k, v, (0, 8), (0, 40)), rtol=1e-4, atol=1e-4
    )


class Broken(tail_attention.CpuKernel):
    """Its backward uses the log-sum-exps of its own part, not the joined ones."""

    def forward(self, q, k, v, is_causal):
        out, lse, _ = super().forward(q, k, v, is_causal)
        return out, lse, lse

    def backward(self, grad, q, k, v, out, lse, kept, is_causal):
        return super().backward(grad, q, k, v, out, kept, None, is_causal)


class Raising(tail_attention.CpuKernel):
    def forward(self, q, k, v, is_causal):
        raise RuntimeError("no plan found")


def test_the_probe_finds_a_wrong_gradient_and_an_error():
    device = torch.device("cpu")
    assert tail_attention.what_is_wrong(tail_attention.CpuKernel(), device) is None
    found = tail_attention.what_is_wrong(Broken(), device)
    assert found is not None
    assert "the gradient of q differs from the reference by" in found
    assert (
        tail_attention.what_is_wrong(Raising(), device) == "it raised RuntimeError: no plan found"
    )


def test_a_kernel_that_fails_the_probe_is_not_used(monkeypatch, caplog):
    def wrong(*_):
        assert torch.is_grad_enabled()
        return "it raised an error"

    monkeypatch.setattr(tail_attention, "what_is_wrong", wrong)
    tail_attention.cudnn_kernel.cache_clear()
    with torch.no_grad():
        assert tail_attention.cudnn_kernel() is None
    assert "the kernel of packed documents does" in caplog.text
    tail_attention.cudnn_kernel.cache_clear()


def test_long_tails_of_one_document_go_to_the_two_products(monkeypatch):
    monkeypatch.setattr(tail_attention, "LEAST_PAIRS", 64 * 128)
    monkeypatch.setattr(tail_attention, "tail_attention", lambda *_: "tail")
    kernels = [tail_attention.CpuKernel()]
    attention = gpu_attention.dense_or_packed(
        lambda *_: "dense", lambda *_: "packed", lambda: kernels[-1]
    )

    def chosen(queries, keys, cu_q=None, cu_k=None, window=None, dtype=torch.bfloat16, d=16):
        x = make(queries, keys, dtype=dtype, d=d)
        return attention(*x, cu_q or (0, queries), cu_k or (0, keys), window)

    assert chosen(64, 128) == "tail"
    assert chosen(64, 127) == "packed"  # too small
    kernels.append(None)
    assert chosen(64, 128) == "packed"  # the kernel failed its probe
    kernels.pop()
    assert chosen(128, 128) == "dense"
    assert chosen(64, 128, (0, 32, 64), (0, 60, 128)) == "packed"  # two documents
    assert chosen(64, 128, window=9) == "packed"
    assert chosen(64, 128, dtype=torch.float32) == "packed"
    assert chosen(64, 128, d=12) == "packed"
    monkeypatch.setattr(gpu_attention, "is_deterministic", lambda: True)
    assert chosen(64, 128) == "packed"


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_is_right_on_a_gpu(head_dim):
    device = torch.device("cuda")
    kernel = tail_attention.CudnnKernel()
    assert tail_attention.what_is_wrong(kernel, device, head_dim) is None
