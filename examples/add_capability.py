#!/usr/bin/env python3
"""Add a capability of your own, and choose heads by it.

A capability draws pairs of prompts: a clean one, whose answer the model knows, and a corrupted one of equal
length with another right answer. Heads that cause the difference keep full attention.

    python examples/add_capability.py                      # the package's tiny teacher
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import megatron_hydra as mh


@dataclasses.dataclass(frozen=True)
class CopyTwice:
    """A random sequence twice: the model must copy the token that followed the last token before.

    Attributes:
        name: as in ``--tasks``.
        length: tokens of the sequence.
    """

    name: str
    length: int

    def prompts(
        self, tokenizer: Any | None, vocab_size: int, count: int, seed: int
    ) -> list[mh.PromptPair]:
        """``count`` pairs. The tokenizer is not needed, because prompts are token ids."""
        generator = random.Random(f"{self.name}/{seed}")
        return [self._pair(generator, vocab_size) for _ in range(count)]

    def _pair(self, generator: random.Random, vocab_size: int) -> mh.PromptPair:
        *sequence, other = generator.sample(range(vocab_size), self.length + 1)
        changed = [*sequence[:-1], other]
        again = tuple(sequence[:-1])
        return mh.PromptPair(
            clean=(*sequence, *again),
            corrupted=(*changed, *again),
            answer=(sequence[-1],),
            wrong=(other,),
        )


def copy_twice(task: str, options: Mapping[str, str]) -> CopyTwice:
    """``copy_twice`` or ``copy_twice:length=24`` as written in ``tasks``."""
    return CopyTwice(task, int(options.get("length", 12)))


def main(argv: list[str] | None = None) -> mh.HeadMap:
    """Register the capability, select heads by it and by a built-in one, and compare the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(mh.shipped_teacher()), help="a folder or a Hub name")
    args = parser.parse_args(argv)

    mh.register_capability("copy_twice", copy_twice)
    options = mh.SelectionOptions(num_prompts=16, min_prompts=4, max_rounds=1, stability=False)
    tasks = ["copy_twice:length=12", "induction:length=12"]
    head_map = mh.select_heads(args.model, tasks=tasks, options=options)
    for name, scores in head_map.scores.items():
        score, layer, head = max(
            (score, layer, head)
            for layer, row in enumerate(scores)
            for head, score in enumerate(row)
        )
        print(f"{name}: layer {layer}, head {head} scores highest ({score:.2f})")
    return head_map


if __name__ == "__main__":
    main()
