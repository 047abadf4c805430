"""Needle tasks: facts hidden in a long text, and a question at its end (RULER's NIAH family).

Wording, kinds of haystack, keys and values follow RULER (Hsieh et al., arXiv 2404.06654; NVIDIA/RULER,
Apache-2.0), so models that were not trained with this package get the usual questions. Generated sentences or
the user's own text replace RULER's essays.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Sequence
from typing import Literal

from megatron_hydra.data.text import (
    NOISE,
    Fitter,
    distinct_names,
    random_number,
    random_uuid,
    text_sentence,
)
from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.tasks import GenerationSample, SampleRequest, register_task

NEW_TOKENS = 128
"""Maximum number of new tokens, as in RULER. Generation stops when the score is settled."""


@dataclasses.dataclass(frozen=True)
class NeedleTask:
    """Facts "the special magic number for <key> is <value>" in a haystack.

    With one value and one query, the requested fact is placed at each of the depths. Otherwise all facts have
    random positions.

    Attributes:
        name: key in the results.
        haystack: ``noise`` (one sentence repeated), ``text`` (different sentences, or the user's file), or
            ``needles`` (only facts that are not requested).
        keys, values: form of names and values.
        num_keys: number of facts (without those of a haystack of needles).
        num_values: number of values of each key.
        num_queries: number of keys in the question.
    """

    name: str
    haystack: Literal["noise", "text", "needles"] = "text"
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    @property
    def has_depth(self) -> bool:
        """Whether only one fact is requested, so that its depth can be chosen."""
        return self.num_values == self.num_queries == 1

    def samples(self, request: SampleRequest) -> list[GenerationSample]:
        """``count`` samples per depth (or in total, without depths)."""
        fitter = Fitter(request.tokenizer, request.length - NEW_TOKENS, self.name)
        depths: Sequence[float | None] = request.depths if self.has_depth else (None,)
        return [
            self._sample(request, fitter, depth, request.rng(self.name, depth, index))
            for depth in depths
            for index in range(request.count)
        ]

    def _sample(
        self, request: SampleRequest, fitter: Fitter, depth: float | None, rng: random.Random
    ) -> GenerationSample:
        names = self._names(rng, self.num_keys)
        facts = [(name, self._value(rng)) for name in names for _ in range(self.num_values)]
        asked = names[: self.num_queries]
        places = [rng.random() for _ in facts]
        if depth is not None:
            places[0] = depth
        units = _Haystack(self, request.haystack, names, rng)
        plural = self.num_values * self.num_queries > 1
        query = ", ".join(asked[:-1]) + (", and " if len(asked) > 1 else "") + asked[-1]

        def build(count: int) -> str:
            sentences = units.take(count)
            inserted = sorted(
                (round(place * len(sentences)), order, self._fact(*fact))
                for order, (place, fact) in enumerate(zip(places, facts, strict=True))
            )
            for at, _, sentence in reversed(inserted):
                sentences.insert(at, sentence)
            return self._prompt(units.join(sentences), query, plural)

        prompt = fitter.fit(build)
        answers = tuple(value for name, value in facts if name in asked)
        others = tuple(value for name, value in facts if name not in asked)
        return GenerationSample(
            prompt,
            answers,
            max_new_tokens=NEW_TOKENS,
            depth=depth,
            others=others + tuple(units.values),
        )

    def _names(self, rng: random.Random, count: int, taken: Collection[str] = ()) -> list[str]:
        if self.keys == "uuids":
            return [random_uuid(rng) for _ in range(count)]
        return distinct_names(rng, count, taken)

    def _value(self, rng: random.Random) -> str:
        return random_uuid(rng) if self.values == "uuids" else random_number(rng)

    def _fact(self, name: str, value: str) -> str:
        return f"One of the special magic {self.values} for {name} is: {value}."

    def _prompt(self, context: str, query: str, plural: bool) -> str:
        kind = self.values if plural else self.values[:-1]
        some, are = ("Some", "are") if plural else ("A", "is")
        what = "What are all" if plural else "What is"
        return (
            f"{some} special magic {kind} {are} hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {kind} afterwards.\n{context}\n"
            f"{what} the special magic {kind} for {query} mentioned in the provided text? "
            f"The special magic {kind} for {query} mentioned in the provided text {are}"
        )


class _Haystack:
    """An endless sequence of distractors. Any number of them has the same beginning."""

    def __init__(
        self, task: NeedleTask, own_text: str, asked: Sequence[str], rng: random.Random
    ) -> None:
        self.task = task
        self.rng = random.Random(rng.random())
        self.units: list[str] = []
        self.values: list[str] = []  # of a haystack of needles
        self.taken = set(asked)
        self.own = [line.strip() for line in own_text.splitlines() if line.strip()]
        if own_text and not self.own:
            raise HydraError("the haystack file has no text")
        self.start = self.rng.randrange(len(self.own)) if self.own else 0

    def take(self, count: int) -> list[str]:
        """The first ``count`` distractors."""
        while len(self.units) < count:
            self.units.append(self._next())
        return self.units[:count]

    def _next(self) -> str:
        if self.task.haystack == "noise":
            return NOISE
        if self.task.haystack == "needles":
            (name,) = self.task._names(self.rng, 1, self.taken)
            self.taken.add(name)
            self.values.append(self.task._value(self.rng))
            return self.task._fact(name, self.values[-1])
        if self.own:
            return self.own[(self.start + len(self.units)) % len(self.own)]
        return text_sentence(self.rng)

    def join(self, sentences: list[str]) -> str:
        """Join sentences to the context."""
        return (" " if self.task.haystack == "text" and not self.own else "\n").join(sentences)


TASKS = (
    NeedleTask("niah_single_1", haystack="noise"),
    NeedleTask("niah_single_2"),
    NeedleTask("niah_single_3", values="uuids"),
    NeedleTask("niah_multikey_1", num_keys=4),
    NeedleTask("niah_multikey_2", haystack="needles"),
    NeedleTask("niah_multikey_3", haystack="needles", keys="uuids", values="uuids"),
    NeedleTask("niah_multivalue", num_values=4),
    NeedleTask("niah_multiquery", num_keys=4, num_queries=4),
)
"""RULER's eight needle tasks, by RULER's names."""

for _task in TASKS:
    register_task(_task.name, lambda task=_task: task)  # type: ignore[misc]
