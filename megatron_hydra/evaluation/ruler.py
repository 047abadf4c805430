"""RULER's tasks beyond needles: variable tracking, common and frequent words.

Wording, counts and the example before the question follow RULER (Hsieh et al., arXiv 2404.06654; NVIDIA/RULER,
Apache-2.0). Long word lists use generated words (``misty-harbor``), which need more tokens per word than
RULER's dictionary.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import string
from collections.abc import Callable

from megatron_hydra.data.text import NOISE, WORDS, Fitter, distinct_names, distinct_words
from megatron_hydra.evaluation.tasks import GenerationSample, SampleRequest, register_task


@dataclasses.dataclass(frozen=True)
class VariableTracking:
    """Find all variables with the value of the first variable of a chain.

    Attributes:
        chains: number of chains in the text; the question is about the first.
        hops: number of assignments after the first one.
    """

    name: str = "vt"
    chains: int = 1
    hops: int = 4
    new_tokens: int = 30

    def samples(self, request: SampleRequest) -> list[GenerationSample]:
        """``count`` samples without depths: assignments are spread over the whole text."""
        fitter = Fitter(request.tokenizer, request.length - self.new_tokens, self.name)
        samples = []
        for index in range(request.count):
            rng = request.rng(self.name, index)
            example, found = self._text(rng, letters=3, lines=10)
            head = f"{example} {' '.join(found)}\n\n"
            seed = rng.random()
            answers = self._text(random.Random(seed), letters=5, lines=1)[1]

            def build(lines: int, seed: float = seed, head: str = head) -> str:
                return head + self._text(random.Random(seed), 5, lines)[0]

            prompt = fitter.fit(build, minimum=self.chains * (self.hops + 1))
            samples.append(GenerationSample(prompt, tuple(answers), "all", self.new_tokens))
        return samples

    def _text(self, rng: random.Random, letters: int, lines: int) -> tuple[str, list[str]]:
        """A prompt with ``lines`` lines of noise, and the variables of the first chain."""
        names: dict[str, None] = {}
        while len(names) < self.chains * (self.hops + 1):
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        every = list(names)
        chain_names = [
            every[i * (self.hops + 1) : (i + 1) * (self.hops + 1)] for i in range(self.chains)
        ]
        values = [str(v) for v in rng.sample(range(10000, 99999), self.chains)]
        # Positions are shares of the text, so that a longer text has the same names, values and order.
        placed = []
        for chain, value in zip(chain_names, values, strict=True):
            places = sorted(rng.random() for _ in chain)
            right = [value, *(f"VAR {name}" for name in chain[:-1])]
            for place, name, source in zip(places, chain, right, strict=True):
                placed.append((place, f"VAR {name} = {source}"))
        sentences = [NOISE] * lines
        for place, statement in sorted(placed, reverse=True):
            sentences.insert(round(place * lines), statement)
        context = "\n".join(sentences)
        question = (
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
            f"\n\n{context}\nQuestion: Find all variables that are assigned the value {values[0]} "
            "in the text above. Answer: According to the chain(s) of variable assignment in the "
            f"text above, {self.hops + 1} variables are assigned the value {values[0]}, they are:"
        )
        return question, chain_names[0]


@dataclasses.dataclass(frozen=True)
class CommonWords:
    """Find the ten words of a numbered list that occur more often than the others.

    A short list uses single words. A long list uses names of two words, because there are more of them.
    """

    name: str = "cwe"
    common: int = 10
    new_tokens: int = 120

    def samples(self, request: SampleRequest) -> list[GenerationSample]:
        """``count`` samples without depths."""
        fitter = Fitter(request.tokenizer, request.length - self.new_tokens, self.name)
        short = request.length < 4096
        repeats, example_words, example_repeats = (
            ((6, 1), 20, (3, 1)) if short else ((30, 3), 40, (10, 3))
        )
        every = self._text(random.Random(0), len(WORDS) - self.common, repeats, distinct_words)[0]
        draw = distinct_names if fitter.fits(every) else distinct_words
        samples = []
        for index in range(request.count):
            rng = request.rng(self.name, index)
            example, found = self._text(rng, example_words - self.common, example_repeats, draw)
            head = f"{example} {self._numbered(found)}\n"
            seed = rng.random()
            answers = self._text(random.Random(seed), 1, repeats, draw)[1]

            def build(words: int, seed: float = seed, head: str = head) -> str:
                return head + self._text(random.Random(seed), words, repeats, draw)[0]

            prompt = fitter.fit(build)
            samples.append(GenerationSample(prompt, tuple(answers), "all", self.new_tokens))
        return samples

    def _text(
        self,
        rng: random.Random,
        uncommon: int,
        repeats: tuple[int, int],
        draw: Callable[[random.Random, int], list[str]],
    ) -> tuple[str, list[str]]:
        words = draw(rng, self.common + uncommon)
        answers = words[: self.common]
        listed = answers * repeats[0] + words[self.common :] * repeats[1]
        rng.shuffle(listed)
        question = (
            "Below is a numbered list of words. In these words, some appear more often than "
            f"others. Memorize the ones that appear most often.\n{self._numbered(listed)}\n"
            f"Question: What are the {self.common} most common words in the above list? Answer: "
            f"The top {self.common} words that appear most often in the list are:"
        )
        return question, answers

    def _numbered(self, words: list[str]) -> str:
        return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


@dataclasses.dataclass(frozen=True)
class FrequentWords:
    """Find the three most frequent coded words of a text. Frequencies are proportional to 1/rank^α."""

    name: str = "fwe"
    alpha: float = 2.0
    new_tokens: int = 50

    def samples(self, request: SampleRequest) -> list[GenerationSample]:
        """``count`` samples without depths."""
        budget = request.length - self.new_tokens
        fitter = Fitter(request.tokenizer, budget, self.name)
        samples = []
        for index in range(request.count):
            rng = request.rng(self.name, index)
            vocabulary: dict[str, None] = {}
            while len(vocabulary) < max(8, budget // 50):
                vocabulary["".join(rng.choices(string.ascii_lowercase, k=6))] = None
            # The most frequent "word" is noise.
            words = ["...", *list(vocabulary)[1:]]
            seed = rng.random()

            def build(units: int, seed: float = seed, words: list[str] = words) -> str:
                return self._text(random.Random(seed), words, 16 * units)

            # With fewer words, the second to fourth word would have equal frequencies.
            prompt = fitter.fit(build, minimum=4)
            samples.append(GenerationSample(prompt, tuple(words[1:4]), "all", self.new_tokens))
        return samples

    def _text(self, rng: random.Random, words: list[str], total: int) -> str:
        zeta = _zeta(self.alpha)
        counts = [int(total * rank**-self.alpha / zeta) for rank in range(1, len(words) + 1)]
        text = [word for word, n in zip(words, counts, strict=True) for _ in range(n)]
        rng.shuffle(text)
        return (
            "Read the following coded text and track the frequency of each coded word. Find the "
            f"three most frequently appeared coded words. {' '.join(text)}\nQuestion: Do not "
            "provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text? Answer: According to the coded "
            "text above, the three most frequently appeared words are:"
        )


@functools.cache
def _zeta(alpha: float) -> float:
    """Riemann's ζ(α) for α > 1, with a relative error much smaller than rounding to counts."""
    terms = 10_000
    return sum(rank**-alpha for rank in range(1, terms)) + terms ** (1 - alpha) / (alpha - 1)


TASKS = (VariableTracking(), CommonWords(), FrequentWords())

for _task in TASKS:
    register_task(_task.name, lambda task=_task: task)  # type: ignore[misc]
