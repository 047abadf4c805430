"""The window of the token-wise baseline: its attention compared with a plain mask, and its stored tokens."""

from __future__ import annotations

import pytest
import torch

from megatron_hydra.hf import window_hydrahead
from megatron_hydra.hf.window_hydrahead import extend, latest, window_attention


def plain(q, k, v, window, first):
    """Attention of one query at a time; ``k`` and ``v`` are as in :func:`window_attention`."""
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        for t in range(q.shape[2]):
            seen = min(window, int(first[row]) + t + 1)
            last = t + window  # the index after this query's own key
            keys, values = k[row, :, last - seen : last], v[row, :, last - seen : last]
            scores = torch.einsum("nd,nkd->nk", q[row, :, t], keys) * q.shape[-1] ** -0.5
            out[row, :, t] = torch.einsum("nk,nkd->nd", scores.softmax(-1), values)
    return out


@pytest.mark.parametrize("window", [1, 3, 8, 40])
@pytest.mark.parametrize("block", [1, 4, 256])
def test_attention_equals_one_query_after_the_other(window, block, monkeypatch):
    monkeypatch.setattr(window_hydrahead, "BLOCK", block)
    q = torch.randn(3, 2, 13, 8, dtype=torch.float64)
    k, v = torch.randn(2, 3, 2, window - 1 + 13, 8, dtype=torch.float64)
    first = torch.tensor([0, 2, 100])
    torch.testing.assert_close(
        window_attention(q, k, v, window, first), plain(q, k, v, window, first)
    )


def test_the_last_real_tokens_are_kept():
    tokens = torch.arange(1.0, 12.0)[None, :, None].expand(2, -1, -1)
    extended = extend(tokens[:, :2], None, 3)
    tail = latest(extended, 3, None)
    assert extended[0, :, 0].tolist() == [0, 0, 0, 1, 2]
    assert tail[0, :, 0].tolist() == [0, 1, 2]
    # four new tokens: all are real in the first row, none in the second
    extended = extend(tokens[:, 2:6], tail, 3)
    tail = latest(extended, 3, torch.tensor([[True] * 4, [False] * 4]))
    assert extended[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert tail[:, :, 0].tolist() == [[4, 5, 6], [0, 1, 2]]
    valid = torch.tensor([[True, False], [True, True]])
    tail = latest(extend(tokens[:, 6:8], tail, 3), 3, valid)
    assert tail[:, :, 0].tolist() == [[5, 6, 7], [2, 7, 8]]
