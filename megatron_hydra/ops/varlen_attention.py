"""Causal softmax attention over packed documents, with different numbers of queries and keys.

A query sees all keys before it, or a window of the last ones.

The torch implementation here is the reference and the CPU path. It groups documents of equal lengths into one
batched call. So a stream of equal rows needs no Python loop and no mask of size T².
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: tuple[int, ...],
    cu_k: tuple[int, ...],
    window: int | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ/√d) v of each segment, causal; the last query is aligned with the last key.

    Args:
        q: ``[Tq, n, d]``.
        k, v: ``[Tk, g, d]`` with g dividing n (grouped queries: query head i reads kv head i·g/n).
        cu_q, cu_k: segment boundaries, ``0 … Tq`` and ``0 … Tk``; a segment has at least as many keys
            as queries.
        window: number of keys that a query sees, with its own; ``None``: all before it.

    Returns:
        ``[Tq, n, d]`` in ``q``'s dtype.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i in range(len(cu_q) - 1):
        groups[cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]].append(i)
    if len(groups) == 1:
        ((len_q, len_k),) = groups
        return _batched(q, k, v, len(cu_q) - 1, len_q, len_k, window).reshape(q.shape)

    pieces: list[torch.Tensor | None] = [None] * (len(cu_q) - 1)
    for (len_q, len_k), members in groups.items():
        q_rows = torch.cat([q[cu_q[i] : cu_q[i + 1]] for i in members])
        k_rows = torch.cat([k[cu_k[i] : cu_k[i + 1]] for i in members])
        v_rows = torch.cat([v[cu_k[i] : cu_k[i + 1]] for i in members])
        out = _batched(q_rows, k_rows, v_rows, len(members), len_q, len_k, window)
        for i, piece in zip(members, out, strict=True):
            pieces[i] = piece
    return torch.cat([piece for piece in pieces if piece is not None])


def _batched(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: int,
    len_q: int,
    len_k: int,
    window: int | None,
) -> torch.Tensor:
    """Attention of ``segments`` equal segments at once; returns ``[segments, len_q, n, d]``."""
    q = q.view(segments, len_q, *q.shape[1:]).transpose(1, 2)
    k = k.view(segments, len_k, *k.shape[1:]).transpose(1, 2)
    v = v.view(segments, len_k, *v.shape[1:]).transpose(1, 2)
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    if window is not None and window < len_k:
        out = _banded(q, k, v, window)
    elif len_q == len_k:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=len_q > 1)
    else:
        rows = torch.arange(len_k - len_q, len_k, device=q.device)[:, None]
        mask = rows >= torch.arange(len_k, device=q.device)[None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2)


def _banded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Blocks of ``window`` queries against their own and the previous block's keys.

    Work and memory grow with T·w, not with T². All ``[s, n, ·, d]``; see ``varlen_attention``.
    """
    len_q, len_k = q.shape[2], k.shape[2]
    seen = min(len_k, len_q + window - 1)  # earlier keys are in no query's window
    front, back = seen - len_q, -seen % window
    q = F.pad(q, (0, 0, front, back))
    k, v = (F.pad(x[:, :, len_k - seen :], (0, 0, 0, back)) for x in (k, v))
    attend = F.scaled_dot_product_attention
    first = slice(0, window)
    outputs = [attend(q[:, :, first], k[:, :, first], v[:, :, first], is_causal=True)]
    if seen > window:
        later = q[:, :, window:].unflatten(2, (-1, window))
        k, v = (x.unflatten(2, (-1, window)) for x in (k, v))
        k, v = (torch.cat((x[:, :, :-1], x[:, :, 1:]), dim=3) for x in (k, v))
        row = torch.arange(window, device=q.device)[:, None]
        column = torch.arange(2 * window, device=q.device)[None, :]
        band = (column > row) & (column <= row + window)
        later, k, v = (x.flatten(0, 1) for x in (later, k, v))
        blocks = attend(later, k, v, attn_mask=band)
        outputs.append(blocks.reshape(*q.shape[:2], -1, v.shape[-1]))
    return torch.cat(outputs, dim=2)[:, :, front : front + len_q]
