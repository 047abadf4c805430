"""Tasks of the quickstart's models: real text with hidden facts, copying, and plain text.

A *fact* is a key token followed by a value token. Facts are at random places in real text. The end of the
sequence asks for some of them: it has the key again, then the value, which is the answer. Every answer is one
token at a known position, so one forward scores all answers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_hydra.data.document import Document
from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.tasks import SampleRequest, ScoredSample
from megatron_hydra.files import write_text_atomic
from megatron_hydra.quickstart.shipped import shipped_text
from megatron_hydra.quickstart.vocabulary import Vocabulary

TRAIN_LENGTH = 128
PAIRS = 24
QUERIES = 8
Loss = Literal["targets", "all"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sequence of S tokens.

    Attributes:
        tokens: ``[S]`` int64.
        loss_mask: ``[S]`` bool; whether the token *at* a position is a target of the loss. Keys and values of
            facts are random, so no model can learn them: they are not targets.
        answers: positions of the answer tokens, ascending; the prediction is one position before.
        sources: for each answer, the position of the fact's value that it repeats.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    answers: np.ndarray
    sources: np.ndarray


@functools.lru_cache(maxsize=4)
def _text_ids(tokenizer: Any) -> np.ndarray:
    return np.array(tokenizer(shipped_text())["input_ids"], dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class TaskGenerator:
    """Draws samples. It has no random state: the caller's ``rng`` decides everything.

    Attributes:
        vocabulary: roles of the token ids.
        text: token ids of the real text, ``[N]`` int64.
    """

    vocabulary: Vocabulary
    text: np.ndarray

    @classmethod
    def of(cls, tokenizer: Any) -> TaskGenerator:
        """The generator for a quickstart tokenizer and the shipped text."""
        return cls(Vocabulary.of(tokenizer), _text_ids(tokenizer))

    def plain_text(self, rng: np.random.Generator, length: int) -> Sample:
        """A piece of real text; every token except the first is a target."""
        tokens = self._text_piece(rng, length)
        mask = np.ones(length, dtype=bool)
        mask[0] = False
        return Sample(tokens, mask, np.empty(0, np.int64), np.empty(0, np.int64))

    def copying(self, rng: np.random.Generator, length: int) -> Sample:
        """A random segment of distinct tokens, repeated to the end; the repetitions are targets."""
        longest = min(length // 2, self.vocabulary.size)
        period = int(rng.integers(min(max(3, length // 10), longest), longest + 1))
        segment = rng.permutation(self.vocabulary.size)[:period]
        tokens = np.tile(segment, length // period + 1)[:length]
        positions = np.arange(length)
        return Sample(tokens, positions >= period, positions[period:], positions[:-period])

    def needles(
        self, rng: np.random.Generator, length: int, pairs: int = PAIRS, queries: int = QUERIES
    ) -> Sample:
        """``pairs`` facts hidden in real text; the end asks for ``queries`` of them.

        Args:
            length: S; facts are spread over the whole of the text, S − 2·queries tokens.
            pairs: facts with distinct keys, at most the number of key tokens.
            queries: number of questions, at most ``pairs``.

        Raises:
            HydraError: the facts and questions do not fit into ``length``.
        """
        body = length - 2 * queries
        filler = body - 2 * pairs
        if filler < 0 or not 1 <= queries <= pairs <= len(self.vocabulary.keys):
            raise HydraError(
                f"needles: {pairs} pairs and {queries} queries do not fit: they need "
                f"{2 * (pairs + queries)} of {length} tokens, queries ≤ pairs, and pairs ≤ "
                f"{len(self.vocabulary.keys)}"
            )
        keys = rng.permutation(self.vocabulary.keys)[:pairs]
        values = rng.choice(self.vocabulary.values, pairs)
        # The place of a fact among the body's filler+pairs units (a unit: a text token or a fact).
        units = np.sort(rng.choice(filler + pairs, pairs, replace=False))
        at = units + np.arange(pairs)
        asked = rng.permutation(pairs)[:queries]
        tokens = np.empty(length, dtype=np.int64)
        is_text = np.zeros(length, dtype=bool)
        is_text[:body] = True
        is_text[at] = is_text[at + 1] = False
        tokens[is_text] = self._text_piece(rng, filler)
        tokens[at], tokens[at + 1] = keys, values
        tokens[body::2], tokens[body + 1 :: 2] = keys[asked], values[asked]
        answers = body + 1 + 2 * np.arange(queries)
        mask = is_text
        mask[0] = False
        mask[answers] = True
        return Sample(tokens, mask, answers, at[asked] + 1)

    def _text_piece(self, rng: np.random.Generator, length: int) -> np.ndarray:
        start = int(rng.integers(0, len(self.text) - length))
        return self.text[start : start + length]


# -- as training data: config key data.blend, task megatron_hydra.quickstart.tasks:<name> ---------


def needles(
    rng: np.random.Generator,
    length: int,
    tokenizer: Any,
    *,
    pairs: int = PAIRS,
    queries: int = QUERIES,
    loss: Loss = "targets",
) -> list[Document]:
    """Facts in text; see :meth:`TaskGenerator.needles`.

    Args:
        loss: ``targets``: text and answers; ``all``: also the facts' random tokens (for stage 1, which learns
            from the teacher's attention at every position).
    """
    return _documents(TaskGenerator.of(tokenizer).needles(rng, length, pairs, queries), loss)


def copying(
    rng: np.random.Generator, length: int, tokenizer: Any, *, loss: Loss = "targets"
) -> list[Document]:
    """A repeated random segment; see :meth:`TaskGenerator.copying`."""
    return _documents(TaskGenerator.of(tokenizer).copying(rng, length), loss)


def plain_text(rng: np.random.Generator, length: int, tokenizer: Any) -> list[Document]:
    """A piece of the shipped text."""
    return _documents(TaskGenerator.of(tokenizer).plain_text(rng, length), "targets")


def _documents(sample: Sample, loss: Loss) -> list[Document]:
    if loss not in ("targets", "all"):
        raise HydraError(f"option loss is {loss!r}: it must be targets or all")
    if loss == "all":
        return [Document.all_trainable(sample.tokens)]
    return [Document(sample.tokens, sample.loss_mask)]


# -- as an evaluation: tools/evaluate.py --tasks megatron_hydra.quickstart.tasks:retrieval ---------


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Needles with equally many facts at every length; one forward scores all answers of a sequence.

    Attributes:
        pairs, queries: see :meth:`TaskGenerator.needles`.
        name: key in the results.
    """

    pairs: int = PAIRS
    queries: int = QUERIES
    name: str = "facts"

    def samples(self, request: SampleRequest) -> list[ScoredSample]:
        """``request.count`` sequences of ``request.length`` tokens; depths are random."""
        tasks = TaskGenerator.of(request.tokenizer)
        rng = np.random.default_rng([request.seed, request.length])
        drawn = [
            tasks.needles(rng, request.length, self.pairs, self.queries)
            for _ in range(request.count)
        ]
        return [
            ScoredSample(
                s.tokens.tolist(), s.answers.tolist(), (s.sources / request.length).tolist()
            )
            for s in drawn
        ]


def retrieval() -> Retrieval:
    """The quickstart's evaluation task."""
    return Retrieval()


# -- as prompts for head selection: tools/select_heads.py --tasks jsonl:PATH -----------------------


def write_selection_prompts(path: Path, tokenizer: Any, count: int, seed: int) -> None:
    """Clean and corrupted prompts, aligned token by token, as JSON lines of token ids.

    The last token asks for a fact. In the corrupted prompt the asked key and the key of another fact are
    exchanged, so the right answer is the other fact's value. So a head must find the place of the key, not only
    a value.
    """
    tasks = TaskGenerator.of(tokenizer)
    rng = np.random.default_rng(seed)
    lines: list[str] = []
    while len(lines) < count:
        sample = tasks.needles(rng, TRAIN_LENGTH, queries=2)
        clean = sample.tokens[: sample.answers[1]]
        # The first query only selects the other fact; it must not be in the prompt.
        other, asked = sample.sources
        clean = np.delete(clean, [sample.answers[0] - 1, sample.answers[0]])
        corrupted = clean.copy()
        corrupted[[asked - 1, other - 1]] = clean[[other - 1, asked - 1]]
        answer, wrong = int(clean[asked]), int(clean[other])
        if answer != wrong:
            line = {
                "clean": clean.tolist(),
                "corrupted": corrupted.tolist(),
                "answer": answer,
                "wrong_answer": wrong,
            }
            lines.append(json.dumps(line))
    write_text_atomic(path, "\n".join(lines) + "\n")


def write_calibration(path: Path, tokenizer: Any, seed: int, count: int = 64) -> None:
    """Sequences of the training length for calibrating γ, as JSON lines of token ids."""
    tasks, rng = TaskGenerator.of(tokenizer), np.random.default_rng([seed, 1])
    lines = [
        json.dumps({"tokens": tasks.needles(rng, TRAIN_LENGTH, queries=16).tokens.tolist()})
        for _ in range(count)
    ]
    write_text_atomic(path, "\n".join(lines) + "\n")
