"""Interface between data and training: a packed stream of tokens."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A micro-batch of m sequences of S tokens as one stream of T = m·S tokens (global, before any sharding).

    Documents are contiguous and never cross a sequence boundary. Padding is a separate document with
    ``loss_mask`` 0, so it does not change a loss or the state of another document.

    Attributes:
        tokens: ``[T]`` int64.
        labels: ``[T]`` int64; the next token *of the same document*. At a document's last token the
            label is arbitrary but valid, and masked.
        loss_mask: ``[T]`` float32 in {0, 1}.
        cu_seqlens: document boundaries, ``0 = c_0 < c_1 < … < c_n = T``; host integers, so that layers can
            read them without a device synchronisation.
        sample_ids: identity of the packed sequences, for logs and for tests of exact resuming.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: tuple[int, ...]
    sample_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        length = self.tokens.numel()
        for name in ("tokens", "labels", "loss_mask"):
            tensor = getattr(self, name)
            if tensor.shape != (length,):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({length},)")
        cu = self.cu_seqlens
        if cu[0] != 0 or cu[-1] != length or any(a >= b for a, b in zip(cu, cu[1:], strict=False)):
            raise ValueError(f"cu_seqlens {cu[:8]}… must increase strictly from 0 to {length}")
