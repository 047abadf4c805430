"""A task for ``tools/evaluate.py``: answers inside sequences; the model knows some of them."""

from __future__ import annotations

import random

from megatron_hydra.evaluation import ScoredSample

VOCABULARY = 64


class Inside:
    """Random tokens; a third of the positions are answers."""

    name = "inside"

    def samples(self, request) -> list[ScoredSample]:
        made = []
        for index in range(request.count):
            rng = request.rng(self.name, index)
            made.append(self._sample(rng, request.length - 4 * index))
        return made

    def _sample(self, rng: random.Random, length: int) -> ScoredSample:
        tokens = [rng.randrange(VOCABULARY) for _ in range(length)]
        return ScoredSample(tokens, sorted(rng.sample(range(1, length), length // 3)))


def make() -> Inside:
    return Inside()
