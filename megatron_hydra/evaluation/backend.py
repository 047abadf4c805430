"""Interface between the scorer and a model: one Hugging Face process, or many Megatron processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A prompt for greedy decoding.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: maximum number of new tokens.
        draft: a guess of the continuation. It does not change the result: a back end without a cache checks
            it in one forward instead of generating token by token.
        settled: function of the new tokens so far; true if no more are needed.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    draft: Sequence[int] = ()
    settled: Callable[[list[int]], bool] = lambda tokens: False


@runtime_checkable
class Backend(Protocol):
    """A model that scores samples, in one process or several.

    All processes of a back end call the same methods in the same order and get the same results.
    """

    is_main: bool
    """Whether this process writes files and shows progress."""

    vocabulary: int
    """Token ids are below it."""

    def inference(self) -> AbstractContextManager[Any]:
        """Context of an evaluation: evaluation mode, no gradients."""

    def identity(self) -> dict[str, Any]:
        """``model_type``, ``weights`` (a fingerprint), ``dtype``, ``prefill_chunk``; JSON."""

    def end_tokens(self, tokenizer: Any) -> list[int]:
        """Ids that end a continuation, from the model or else from ``tokenizer``."""

    def argmax_at(
        self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Most likely next token at ascending positions of each row; only these logits are computed."""

    def generate(
        self, continuations: Sequence[Continuation], end_tokens: Sequence[int]
    ) -> list[list[int]]:
        """New tokens of each prompt, up to its limit, until settled or until an end token (included)."""

    def cache_bytes(self, length: int) -> dict[str, float] | None:
        """Result of :func:`~.cache_bytes.measure_cache_bytes`; ``None`` without a cache."""

    def on_main(self, action: Callable[[], T]) -> T:
        """Run ``action`` on the main process; return its result on every process."""

    def anywhere(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process."""


@runtime_checkable
class Uncached(Protocol):
    """A back end that computes a whole prompt again for each token that the draft does not contain."""

    def seconds_of_forward(self, tokens: int) -> float:
        """Measure the time of one prompt of this length. Called by every process."""


def is_over(tokens: list[int], continuation: Continuation, end_tokens: Sequence[int]) -> bool:
    """Whether the continuation ends with these new tokens; the last one is new."""
    full = len(tokens) >= continuation.max_new_tokens or tokens[-1] in end_tokens
    return full or continuation.settled(tokens)


def cut(
    tokens: list[int], continuation: Continuation, end_tokens: Sequence[int], known: int = 0
) -> list[int]:
    """The new tokens up to the end of the continuation, if it has ended.

    Args:
        known: number of tokens after which it has not ended.
    """
    for count in range(known + 1, len(tokens) + 1):
        if is_over(tokens[:count], continuation, end_tokens):
            return tokens[:count]
    return tokens
