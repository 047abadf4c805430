"""Causal depthwise convolution over a packed stream (design §2, GDN branch)."""

from __future__ import annotations

import torch


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    initial: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_t = Σ_j w[W−1−j] · x_{t−j}, where taps before the document's start are zero.

    Args:
        x: ``[T, C]``, any float dtype.
        weight: ``[C, W]``; the last tap multiplies the current token, so ``[0, …, 0, 1]`` is the identity.
        positions: ``[T]`` int64, each token's position from its document's start.
        initial: ``[W−1, C]``, the tokens just before ``x`` (a context-parallel halo, or the tail of an
            earlier chunk); zeros when absent.

    Returns:
        ``[T, C]`` in ``x``'s dtype. The final state, for a next chunk, is the last W−1 rows of
        ``initial`` followed by ``x``.
    """
    width = weight.shape[1]
    length = x.shape[0]
    if initial is None:
        initial = x.new_zeros(width - 1, x.shape[1])
    extended = torch.cat((initial.to(x.dtype), x), dim=0)
    y = x * weight[:, width - 1].to(x.dtype)
    for back in range(1, width):
        shifted = extended[width - 1 - back : width - 1 - back + length]
        # masked_fill instead of a product: another document's NaN must not become 0 · NaN.
        shifted = shifted.masked_fill((positions < back)[:, None], 0.0)
        y = y + shifted * weight[:, width - 1 - back].to(x.dtype)
    return y


def final_conv_state(
    x: torch.Tensor, width: int, initial: torch.Tensor | None = None
) -> torch.Tensor:
    """The last W−1 rows of the stream, ``[W−1, C]``: ``initial`` for the tokens after ``x``."""
    if initial is None:
        initial = x.new_zeros(width - 1, x.shape[1])
    return torch.cat((initial.to(x.dtype), x), dim=0)[x.shape[0] :]
