"""Interface of a retrieval task, the registry of tasks, and tasks from a JSONL file."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_hydra.errors import HydraError

DEFAULT_NEW_TOKENS = 32
"""Number of new tokens for a JSONL prompt without ``max_new_tokens``."""


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """Request of the runner to a task.

    Attributes:
        length: the context length in tokens, answer included; the maximum length of a sample.
        count: number of samples, per depth if the task places its fact at a depth.
        seed: together with the task's name and ``length`` it determines every sample.
        depths: depths of facts, 0 (start) … 1 (end); also the rows of the heatmap.
        tokenizer: the model's tokenizer; may be ``None`` for tasks that make token ids.
        lengths: all lengths of the run, ascending.
        haystack: the user's own distractor text, or ``""``.
    """

    length: int
    count: int
    seed: int = 1234
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    tokenizer: Any = None
    lengths: tuple[int, ...] = ()
    haystack: str = ""

    def rng(self, task: str, *index: object) -> random.Random:
        """The random generator of one sample; it depends only on the request and the arguments."""
        parts = (self.seed, task, self.length, *index)
        return random.Random("/".join(str(part) for part in parts))


@dataclasses.dataclass(frozen=True)
class GenerationSample:
    """A prompt that the model continues greedily.

    Attributes:
        prompt: text, or token ids.
        answers: texts to find in the continuation, or one sequence of token ids with which the continuation
            must start.
        match: ``all``: score is the share of the answers that occur; ``any``: 1 if one of them occurs.
        max_new_tokens: maximum length of the continuation.
        depth: depth of the fact, or ``None``.
        others: texts that answer another question about this context. A wrong answer with one of them found a
            fact, but not the requested one.
    """

    prompt: str | tuple[int, ...]
    answers: tuple[str, ...] | tuple[int, ...]
    match: Literal["all", "any"] = "all"
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    depth: float | None = None
    others: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ScoredSample:
    """A token sequence that contains its answers; one forward scores all of them.

    Attributes:
        tokens: the whole sequence.
        answers: positions of the answer tokens (≥ 1). An answer is right if the argmax at the position before
            is this token.
        depths: for each answer the depth of its fact, 0 … 1; empty: unknown.
    """

    tokens: Sequence[int]
    answers: Sequence[int]
    depths: Sequence[float] = ()

    def __post_init__(self) -> None:
        if not len(self.answers) or min(self.answers) < 1 or max(self.answers) >= len(self.tokens):
            raise HydraError(
                f"answer positions {list(self.answers)} must be in 1..{len(self.tokens) - 1}, and at least "
                "one is needed"
            )
        if len(self.depths) not in (0, len(self.answers)):
            raise HydraError("a scored sample must have one depth for each answer, or no depths")


Sample = GenerationSample | ScoredSample


class RetrievalTask(Protocol):
    """An object with a name that makes samples; see :class:`SampleRequest`."""

    @property
    def name(self) -> str:
        """Key in the results and part of a file name."""

    def samples(self, request: SampleRequest) -> Sequence[Sample]:
        """The samples of one length, all of one kind. They depend only on the request."""


TASKS: dict[str, Callable[[], RetrievalTask]] = {}
"""Filled by :func:`register_task`."""


def register_task(name: str, make: Callable[[], RetrievalTask]) -> None:
    """Register a task under ``name``, for ``--tasks`` and ``load_task``."""
    TASKS[name] = make


class JsonlTask:
    """The user's own prompts, one JSON object per line.

    Keys: ``prompt`` and ``answer`` (both text or both token ids; ``answer`` may also be a list of texts).
    Optional keys: ``length``, ``depth``, ``max_new_tokens``, ``match``. Without ``length`` a row belongs to the
    smallest length of the run with room for prompt and continuation.

    Raises:
        HydraError: the file cannot be read, or a line is invalid; names the line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.stem
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise HydraError(f"prompts {self.path} cannot be read: {error}") from None
        rows = [(n, self._row(n, line)) for n, line in enumerate(lines, 1) if line.strip()]
        if not rows:
            raise HydraError(f"prompts {self.path} holds no prompt")
        self.rows = rows

    def __repr__(self) -> str:
        return f"JsonlTask({self.rows!r})"

    def samples(self, request: SampleRequest) -> list[Sample]:
        """The first ``count`` rows that belong to ``request.length``."""
        lengths = sorted(request.lengths or (request.length,))
        chosen: list[Sample] = []
        for number, (sample, length) in self.rows:
            if length is None:
                length = self._length_of_row(number, sample, request.tokenizer, lengths)
            if length == request.length:
                chosen.append(sample)
        return chosen[: request.count]

    def _length_of_row(
        self, number: int, sample: GenerationSample, tokenizer: Any, lengths: list[int]
    ) -> int:
        if isinstance(sample.prompt, str):
            if tokenizer is None:
                raise HydraError(f"{self.path}:{number} is text: a tokenizer is needed")
            tokens = len(tokenizer(sample.prompt)["input_ids"])
        else:
            tokens = len(sample.prompt)
        needed = tokens + sample.max_new_tokens
        for length in lengths:
            if needed <= length:
                return length
        raise HydraError(
            f"{self.path}:{number} needs {needed} tokens, but the longest length is {lengths[-1]}: "
            "give a longer length, or the key 'length'"
        )

    def _row(self, number: int, line: str) -> tuple[GenerationSample, int | None]:
        where = f"{self.path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise HydraError(f"{where} is not JSON: {error}") from None
        known = {"prompt", "answer", "length", "depth", "max_new_tokens", "match"}
        if not isinstance(row, dict) or {"prompt", "answer"} - set(row) or set(row) - known:
            raise HydraError(
                f"{where}: a row needs prompt and answer, and may have {sorted(known)}"
            )
        prompt, answer = row["prompt"], row["answer"]
        if isinstance(answer, str):
            answer = [answer]
        kind: type = str if isinstance(prompt, str) else int
        given = [*answer, *(prompt if kind is int else ())] if isinstance(answer, list) else [None]
        if not answer or not all(isinstance(item, kind) for item in given):
            raise HydraError(f"{where}: prompt and answer must both be text, or both token ids")
        default = len(answer) if kind is int else DEFAULT_NEW_TOKENS
        sample = GenerationSample(
            prompt=prompt if kind is str else tuple(prompt),
            answers=tuple(answer),
            match=row.get("match", "all"),
            max_new_tokens=int(row.get("max_new_tokens", default)),
            depth=row.get("depth"),
        )
        return sample, row.get("length")
