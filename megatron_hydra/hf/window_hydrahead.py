"""The window of a token-wise HydraHead baseline (copied into every export; needs torch only).

Softmax attention sees the last w tokens. The recurrent state holds all tokens before them: a token is
written into the state when it leaves the window. Both need the last real tokens of every sequence, like
the short convolution. :func:`extend` puts them before the new tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 256
"""Minimum size of a block of queries. One mask covers a block of queries and its window."""


def extend(x: torch.Tensor, tail: torch.Tensor | None, count: int) -> torch.Tensor:
    """Put the last ``count`` real tokens of earlier calls before the new ones.

    Args:
        x: ``[B, T, channels]``, new tokens, real ones first.
        tail: ``[B, count, channels]``, the last tokens of earlier calls (from :func:`latest`); ``None``: zeros.
        count: number of earlier tokens.

    Returns:
        ``[B, count + T, channels]``.
    """
    if tail is None:
        tail = x.new_zeros(x.shape[0], count, x.shape[2])
    return torch.cat((tail, x), dim=1)


def latest(extended: torch.Tensor, count: int, valid: torch.Tensor | None) -> torch.Tensor:
    """The last ``count`` real tokens of ``extended``, which are ``tail`` of the next call.

    Args:
        extended: ``[B, count + T, channels]``, see :func:`extend`.
        valid: ``[B, T]`` bool, true for real new tokens; ``None``: all are real.
    """
    if valid is None:
        return extended[:, extended.shape[1] - count :].clone()
    rows = valid.sum(1)[:, None] + torch.arange(count, device=extended.device)
    return extended.gather(1, rows[..., None].expand(-1, -1, extended.shape[2]))


def window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, first: torch.Tensor
) -> torch.Tensor:
    """Softmax attention of every query to its own token and the ``window − 1`` tokens before it.

    Args:
        q: ``[B, n, T, d]``.
        k, v: ``[B, n, window − 1 + T, d]``: the tokens before the first query, then one for each query.
        window: number of keys that a query sees.
        first: ``[B or 1]``, the position of the first query in its sequence. Columns before position 0
            are not tokens and are masked.

    Returns:
        ``[B, n, T, d]``.
    """
    outputs = []
    block, length = max(BLOCK, window), q.shape[2]
    missing = (window - 1 - first.clamp(min=0))[:, None, None, None]
    for start in range(0, length, block):
        end = min(start + block, length)
        keys = slice(start, end + window - 1)
        row = torch.arange(start, end, device=q.device)[:, None]
        column = torch.arange(start, end + window - 1, device=q.device)[None, :]
        band = (column >= row) & (column < row + window)
        out = F.scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, keys], v[:, :, keys], attn_mask=band & (column >= missing)
        )
        outputs.append(out)
    return torch.cat(outputs, dim=2)


def within_window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: torch.Tensor,
    window: int,
    first: torch.Tensor,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the last ``window`` tokens, tokens of earlier calls included.

    Args:
        q: ``[B, T, n, d]``; k, v: ``[B, T, g, d]``.
        groups: ``[n]``, for each head its KV group, one of g.
        window, first: see :func:`window_attention`.
        kept: ``[B, window − 1, 2·g·d]``, keys and values of earlier calls; ``None``: no earlier calls.

    Returns:
        ``[B, T, n, d]``, and a tensor whose :func:`latest` is ``kept`` of the next call.
    """
    rows = extend(torch.cat((k, v), dim=-1).flatten(2), kept, window - 1)
    kv = rows.unflatten(2, (-1, 2 * k.shape[-1])).transpose(1, 2).index_select(1, groups)
    k, v = kv.split(k.shape[-1], dim=-1)
    return window_attention(q.transpose(1, 2), k, v, window, first).transpose(1, 2), rows


Writes = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Waiting = tuple[torch.Tensor | None, torch.Tensor | None]


def beyond_window(
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    beta: torch.Tensor,
    window: int,
    waiting: Waiting,
) -> tuple[Writes, tuple[torch.Tensor, torch.Tensor]]:
    """Delay the inputs of the delta rule until their token leaves the window.

    Until the first token leaves, nothing is written (β = 0) and nothing decays (log α = 0).

    Args:
        k, v: ``[B, T, m, d]``; log_alpha, beta: ``[B, T, ·]`` fp32.
        window: the delay in tokens.
        waiting: ``[B, window, 2·m·d]`` and ``[B, window, ·]``, inputs of earlier calls, log α before β;
            ``None``: no earlier calls.

    Returns:
        k, v, log_alpha and beta for the T tokens, and two tensors whose :func:`latest` are ``waiting`` of
        the next call.
    """
    length, d = k.shape[1], k.shape[-1]
    kv = extend(torch.cat((k, v), dim=-1).flatten(2), waiting[0], window)
    gates = extend(torch.cat((log_alpha, beta), -1), waiting[1], window)
    k, v = kv[:, :length].unflatten(2, (-1, 2 * d)).split(d, dim=-1)
    log_alpha, beta = gates[:, :length].split((log_alpha.shape[-1], beta.shape[-1]), dim=-1)
    return (k, v, log_alpha, beta), (kv, gates)
