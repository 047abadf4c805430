"""Score a model on samples: greedy continuations, and answers inside given sequences."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.backend import Backend, Continuation, Uncached
from megatron_hydra.evaluation.tasks import GenerationSample, Sample, ScoredSample


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The score of one sample.

    Attributes:
        scores: one number 0 … 1 for each answer (one in total for a generation sample).
        depths: the depth of each answer, or ``None``.
        prediction: the model's answer, for inspection.
        expected: the right answer.
        confused: whether the answer is wrong and has another fact's value; ``None``: there are no other facts.
        places: which of the text's facts was asked for and which was answered, see :class:`Places`.
    """

    scores: tuple[float, ...]
    depths: tuple[float | None, ...]
    prediction: str
    expected: str
    confused: bool | None = None
    places: Places | None = None


@dataclasses.dataclass(frozen=True)
class Places:
    """Facts by their order in the text, from 0.

    Attributes:
        count: number of facts.
        asked: the right one.
        picked: the one whose value comes first in the answer; ``None``: the answer has no fact's value.
    """

    count: int
    asked: int
    picked: int | None


def accuracy_by_place(asked: Sequence[float], picked: Sequence[float]) -> float:
    """Accuracy of answers that take places with these shares, whatever is asked.

    Args:
        asked, picked: for each place, the share of samples that have the right, or the answered, fact there.
    """
    return sum(a * b for a, b in zip(asked, picked, strict=True))


MOST_PLACES = 16
"""Samples with more facts, such as RULER's third multi-key task, are not counted by place."""


def score_samples(
    backend: Backend, tokenizer: Any, samples: Sequence[Sample], batch_tokens: int
) -> Iterator[Outcome]:
    """Score samples in order. A batch has at most ``batch_tokens`` tokens (but at least one sample).

    Raises:
        HydraError: a sample is text and there is no tokenizer, or a token id is outside the vocabulary.
    """
    batch: list[Any] = []
    widest = 0
    for sample in samples:
        item = _encoded(sample, tokenizer, backend.vocabulary)
        width = max(widest, item.width)
        mixed = batch and type(batch[0]) is not type(item)
        if batch and (mixed or width * (len(batch) + 1) > batch_tokens):
            yield from _score_batch(backend, tokenizer, batch)
            batch, width = [], item.width
        batch.append(item)
        widest = width
    if batch:
        yield from _score_batch(backend, tokenizer, batch)


def forecast(backend: Backend, tokenizer: Any, samples: Sequence[Sample]) -> tuple[float, float]:
    """Estimate the time of :func:`score_samples` for a back end without a cache.

    It times one prompt, because the samples of a cell have about the same length.

    Args:
        samples: samples of one task and length, at least one.

    Returns:
        Seconds if every answer is right (one forward per prompt), and seconds if every answer is wrong (one
        forward per token). Both are 0 for a back end with a cache.
    """
    if not isinstance(backend, Uncached):
        return 0.0, 0.0
    item = _encoded(samples[0], tokenizer, backend.vocabulary)
    seconds = backend.seconds_of_forward(item.width) * len(samples)
    forwards = item.sample.max_new_tokens if isinstance(item, _Prompt) else 1
    return seconds, seconds * forwards


@dataclasses.dataclass(frozen=True)
class _Prompt:
    sample: GenerationSample
    ids: list[int]

    @property
    def width(self) -> int:
        return len(self.ids) + self.sample.max_new_tokens


@dataclasses.dataclass(frozen=True)
class _Sequence:
    sample: ScoredSample
    ids: list[int]

    @property
    def width(self) -> int:
        return len(self.ids)


def _encoded(sample: Sample, tokenizer: Any, vocabulary: int) -> _Prompt | _Sequence:
    item: _Prompt | _Sequence
    if isinstance(sample, ScoredSample):
        item = _Sequence(sample, [int(t) for t in sample.tokens])
    elif isinstance(sample.prompt, str):
        if tokenizer is None:
            raise HydraError("a text task needs the model's tokenizer: give --tokenizer")
        item = _Prompt(sample, tokenizer(sample.prompt)["input_ids"])
    else:
        item = _Prompt(sample, list(sample.prompt))
    if not item.ids or min(item.ids) < 0 or max(item.ids) >= vocabulary:
        raise HydraError(
            f"a sample has no tokens, or token ids outside the model's vocabulary of {vocabulary}: "
            "check that the tokenizer is the model's"
        )
    return item


def _score_batch(backend: Backend, tokenizer: Any, batch: list[Any]) -> list[Outcome]:
    if isinstance(batch[0], _Sequence):
        return _score_sequences(backend, batch)
    return _score_prompts(backend, tokenizer, batch)


# -- sequences with answers inside ----------------------------------------------------------------


def _score_sequences(backend: Backend, batch: list[_Sequence]) -> list[Outcome]:
    asked = [[int(p) - 1 for p in item.sample.answers] for item in batch]
    argmax = backend.argmax_at([item.ids for item in batch], asked)
    outcomes = []
    for item, said in zip(batch, argmax, strict=True):
        expected = [item.ids[p] for p in item.sample.answers]
        outcomes.append(
            Outcome(
                scores=tuple(float(a == b) for a, b in zip(said, expected, strict=True)),
                depths=tuple(item.sample.depths) or (None,) * len(said),
                prediction=" ".join(map(str, said)),
                expected=" ".join(map(str, expected)),
            )
        )
    return outcomes


# -- prompts to be continued ----------------------------------------------------------------------


def _score_prompts(backend: Backend, tokenizer: Any, batch: list[_Prompt]) -> list[Outcome]:
    continuations = [
        Continuation(
            prompt=item.ids,
            max_new_tokens=item.sample.max_new_tokens,
            draft=_draft(item.sample, tokenizer),
            settled=functools.partial(_settled, item.sample, tokenizer),
        )
        for item in batch
    ]
    rows = backend.generate(continuations, backend.end_tokens(tokenizer))
    return [_outcome(item, tokenizer, row) for item, row in zip(batch, rows, strict=True)]


def _draft(sample: GenerationSample, tokenizer: Any) -> list[int]:
    """The right answer in tokens, as the guess of a good model's continuation."""
    if isinstance(sample.answers[0], int):
        return [int(token) for token in sample.answers]
    answers = sample.answers[:1] if sample.match == "any" else sample.answers
    text = " " + ", ".join(map(str, answers))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _settled(sample: GenerationSample, tokenizer: Any, row: list[int]) -> bool:
    """Whether the score can no longer change.

    A text score counts the answers that occur. It is settled when all of them (for ``any``: one of them) have
    occurred. A score of token ids is settled when there are enough tokens.
    """
    if isinstance(sample.answers[0], int):
        return len(row) >= len(sample.answers)
    return text_score(sample, tokenizer.decode(row)) == 1.0


def _outcome(item: _Prompt, tokenizer: Any, row: list[int]) -> Outcome:
    sample = item.sample
    confused = places = None
    if isinstance(sample.answers[0], int):
        expected = list(sample.answers)
        row = row[: len(expected)]
        said, wanted = " ".join(map(str, row)), " ".join(map(str, expected))
        score = float(row == expected)
    else:
        said = tokenizer.decode(row, skip_special_tokens=True)
        wanted = "; ".join(map(str, sample.answers))
        score = text_score(sample, said)
        if sample.others:
            confused = score == 0.0 and any(
                other.lower() in said.lower() for other in sample.others
            )
            places = _places(sample, said)
    return Outcome((score,), (sample.depth,), said, wanted, confused, places)


def _places(sample: GenerationSample, said: str) -> Places | None:
    """``None`` with several answers, with too many facts, or if a value does not occur once in the text."""
    facts, prompt = [*map(str, sample.answers), *sample.others], sample.prompt
    if len(sample.answers) > 1 or len(facts) > MOST_PLACES or not isinstance(prompt, str):
        return None
    if any(prompt.count(fact) != 1 for fact in facts):
        return None
    in_order = sorted(facts, key=prompt.index)
    found = {said.lower().find(fact.lower()): place for place, fact in enumerate(in_order)}
    found.pop(-1, None)
    return Places(len(facts), in_order.index(facts[0]), found[min(found)] if found else None)


def text_score(sample: GenerationSample, said: str) -> float:
    """RULER's string match, ignoring case: share of answers that occur, or for ``any`` whether one occurs."""
    found = [str(answer).lower() in said.lower() for answer in sample.answers]
    return float(any(found)) if sample.match == "any" else sum(found) / len(found)
