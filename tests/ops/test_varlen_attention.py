"""Packed attention against a plain softmax with an explicit mask."""

from __future__ import annotations

import pytest
import torch

from megatron_hydra.ops.varlen_attention import varlen_attention


def plain(q, k, v, cu_q, cu_k, window=None):
    """Attention with one mask over all tokens, written from the definition."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    allowed = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    for i in range(len(cu_q) - 1):
        offset = (cu_k[i + 1] - cu_k[i]) - (cu_q[i + 1] - cu_q[i])
        for row in range(cu_q[i], cu_q[i + 1]):
            end = cu_k[i] + offset + row - cu_q[i] + 1
            start = cu_k[i] if window is None else max(cu_k[i], end - window)
            allowed[row, start:end] = True
    scores = torch.einsum("qnd,knd->nqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, v)


@pytest.mark.parametrize(
    ("cu_q", "cu_k"),
    [
        ((0, 12), (0, 12)),
        ((0, 6, 12, 18), (0, 6, 12, 18)),
        ((0, 1, 8, 15), (0, 1, 8, 15)),
        ((0, 4, 9), (0, 11, 16)),  # queries are the last tokens of a longer document
    ],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 12, 40])
def test_equals_masked_softmax_with_gradients(cu_q, cu_k, kv_heads, window):
    make = lambda t, n: torch.randn(t, n, 8, dtype=torch.float64, requires_grad=True)  # noqa: E731
    q, k, v = make(cu_q[-1], 4), make(cu_k[-1], kv_heads), make(cu_k[-1], kv_heads)
    expected = plain(q, k, v, cu_q, cu_k, window)
    actual = varlen_attention(q, k, v, cu_q, cu_k, window)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(expected, [q, k, v], cotangent),
        torch.autograd.grad(actual, [q, k, v], cotangent),
        strict=True,
    ):
        torch.testing.assert_close(b, a)
