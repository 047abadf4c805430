"""Distractor text without downloads: sentences, unique names, and fitting them into a length."""

from __future__ import annotations

import json
import math
import random
import uuid
from collections.abc import Callable, Collection
from importlib import resources

from megatron_hydra.errors import HydraError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The line that RULER repeats."""

_WORDS: dict[str, list[str]] = json.loads(
    resources.files("megatron_hydra.data").joinpath("words.json").read_text()
)
ADJECTIVES, NOUNS = _WORDS["adjectives"], _WORDS["nouns"]
WORDS = sorted({*ADJECTIVES, *NOUNS})


def text_sentence(rng: random.Random) -> str:
    """An English sentence without facts that a task asks for."""
    subject = rng.choice(_WORDS["people"])
    thing = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    place = f"near the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    verb, ending = rng.choice(_WORDS["verbs"]), rng.choice(_WORDS["endings"])
    sentence = f"{subject} {verb} the {thing} {place} {ending}."
    return sentence[0].upper() + sentence[1:]


def distinct_names(rng: random.Random, count: int, taken: Collection[str] = ()) -> list[str]:
    """``count`` names such as ``misty-harbor``, different from each other and from ``taken``.

    Names have three words if half of all two-word names are in use.
    """
    names: dict[str, None] = {}
    while len(names) < count:
        words = [rng.choice(ADJECTIVES), rng.choice(NOUNS)]
        if 2 * (len(names) + len(taken)) > len(ADJECTIVES) * len(NOUNS):
            words.insert(0, rng.choice(ADJECTIVES))
        name = "-".join(words)
        if name not in taken:
            names[name] = None
    return list(names)


def distinct_words(rng: random.Random, count: int) -> list[str]:
    """``count`` different words. If :data:`WORDS` has too few, some are names of two words."""
    words = rng.sample(WORDS, min(count, len(WORDS)))
    return words + distinct_names(rng, count - len(words))


def random_number(rng: random.Random) -> str:
    """A seven-digit number, as in RULER."""
    return str(rng.randint(1_000_000, 9_999_999))


def random_uuid(rng: random.Random) -> str:
    """A version-4 UUID drawn from ``rng``."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


class Fitter:
    """Finds the number of distractor units with which a prompt fills its budget without exceeding it.

    It remembers the size of the last prompt. Samples of one length differ little, so most later prompts are
    measured only once.
    """

    def __init__(self, tokenizer: object, budget: int, task: str) -> None:
        if tokenizer is None:
            raise HydraError(f"task {task!r} generates text: it needs the model's tokenizer")
        self.tokenizer = tokenizer
        self.budget = budget
        self.task = task
        self.guess: int | None = None
        self.slope = 0.0

    def _tokens(self, prompt: str) -> int:
        return len(self.tokenizer(prompt)["input_ids"])  # type: ignore[operator]

    def fits(self, prompt: str) -> bool:
        """Whether a prompt is within the budget."""
        return self._tokens(prompt) <= self.budget

    def fit(self, build: Callable[[int], str], minimum: int = 1) -> str:
        """Return the longest prompt found that fits.

        Args:
            build: function from a number of units to a prompt; more units give a longer prompt.
            minimum: smallest number of units that the task needs.

        Raises:
            HydraError: ``minimum`` units do not fit.
        """
        best = build(minimum)
        base = self._tokens(best)
        if base > self.budget:
            raise HydraError(
                f"task {self.task!r} needs at least {base} prompt tokens, but only {self.budget} remain "
                "after the answer: use a longer length"
            )
        if not self.slope:
            self.slope = max((self._tokens(build(minimum + 32)) - base) / 32, 0.1)
        low, high = minimum, None
        units = self.guess or minimum + int((self.budget - base) / self.slope)
        for _ in range(12):
            units = max(low, units)
            prompt = build(units)
            tokens = self._tokens(prompt)
            spare = self.budget - tokens
            if spare >= 0:
                best, low = prompt, units
                step = max(1, int(spare / self.slope * 0.98))
                if spare < 2 * self.slope or (high is not None and units + 1 >= high):
                    break
                units = units + step if high is None else min(units + step, high - 1)
            else:
                high = units
                units -= max(1, math.ceil(-spare / self.slope))
        self.guess = low
        return best
