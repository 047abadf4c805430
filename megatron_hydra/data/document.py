"""Unit between sources and packer: one document, or a piece of a document."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens of one document, and its loss mask.

    Attributes:
        tokens: ``[n]`` int64 token ids.
        trainable: ``[n]`` bool; whether the loss of *predicting this token* counts. The first token of a
            document is never predicted, because no token comes before it.
    """

    tokens: np.ndarray
    trainable: np.ndarray

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or self.tokens.shape != self.trainable.shape:
            raise ValueError(
                f"tokens {self.tokens.shape} and trainable {self.trainable.shape} must be one-dimensional "
                "and of equal length"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def all_trainable(cls, tokens: np.ndarray) -> Document:
        """A document with loss on every token."""
        return cls(np.asarray(tokens, dtype=np.int64), np.ones(len(tokens), dtype=bool))
