"""The data of the shipped experiments: the quickstart's teacher and tokens, four kinds of questions.

They replace the paper's benchmarks for a model with a quarter of a million weights: ``single`` for S-NIAH,
``facts`` for MK-NIAH, ``copying`` for in-context use of a pattern, ``text`` (next characters of English) for
tasks that need only near tokens.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from megatron_hydra.evaluation.tasks import SampleRequest, ScoredSample
from megatron_hydra.hf_loading import find_tokenizer
from megatron_hydra.quickstart.tasks import (
    Retrieval,
    TaskGenerator,
    write_calibration,
    write_selection_prompts,
)


def write_inputs(folder: Path, model: Path, seed: int, prompts: int = 32) -> None:
    """Write ``selection.jsonl`` and ``calibration.jsonl``, as in the quickstart."""
    tokenizer = find_tokenizer(model)
    write_selection_prompts(folder / "selection.jsonl", tokenizer, prompts, seed)
    write_calibration(folder / "calibration.jsonl", tokenizer, seed)


def single() -> Retrieval:
    """One fact in the whole text; the end asks for it."""
    return Retrieval(pairs=1, queries=1, name="single")


def facts() -> Retrieval:
    """24 facts; the end asks for eight of them, as in the quickstart's evaluation."""
    return Retrieval()


@dataclasses.dataclass(frozen=True)
class Copying:
    """A random segment that repeats to the end; answers are tokens of its repetitions.

    Attributes:
        answers: how many positions of a sequence are asked.
        longest: at longer lengths there are no samples.
        name: key in the results.
    """

    answers: int = 16
    longest: int = 256
    name: str = "copying"

    def samples(self, request: SampleRequest) -> list[ScoredSample]:
        """``request.count`` sequences."""
        if request.length > self.longest:
            return []
        tasks = TaskGenerator.of(request.tokenizer)
        rng = np.random.default_rng([request.seed, request.length, 1])
        drawn = []
        for _ in range(request.count):
            sample = tasks.copying(rng, request.length)
            # Not the first repeated token: earlier tokens do not determine it.
            asked = np.sort(rng.choice(sample.answers[1:], self.answers, replace=False))
            drawn.append(ScoredSample(sample.tokens.tolist(), asked.tolist()))
        return drawn


@dataclasses.dataclass(frozen=True)
class Text:
    """The next character of English text, at places in its second half.

    Teacher and students are trained on this text, because the package has no other. So it shows whether a
    student keeps what the teacher knows, not how well it generalises.

    Attributes:
        answers: how many positions of a sequence are asked.
        longest: at longer lengths there are no samples.
        name: key in the results.
    """

    answers: int = 32
    longest: int = 256
    name: str = "text"

    def samples(self, request: SampleRequest) -> list[ScoredSample]:
        """``request.count`` pieces."""
        if request.length > self.longest:
            return []
        tasks = TaskGenerator.of(request.tokenizer)
        rng = np.random.default_rng([request.seed, request.length, 2])
        drawn = []
        for _ in range(request.count):
            tokens = tasks.plain_text(rng, request.length).tokens
            asked = rng.choice(np.arange(request.length // 2, request.length), self.answers, False)
            drawn.append(ScoredSample(tokens.tolist(), np.sort(asked).tolist()))
        return drawn


def copying() -> Copying:
    """For ``evaluation.tasks``."""
    return Copying()


def text() -> Text:
    """For ``evaluation.tasks``."""
    return Text()
