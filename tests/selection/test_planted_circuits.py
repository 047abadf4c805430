"""The engine finds circuits that were planted, at random places; attention mass does not."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_hydra.selection.effects import EffectEngine, top_heads
from megatron_hydra.selection.ranking import rank_heads
from megatron_hydra.selection.runner import DecoderRunner
from megatron_hydra.selection.work import Ranks, WorkBench
from tests.selection.planted import induction_pairs, plant


def assert_exactly(scores: np.ndarray, planted: list[tuple[int, int]]) -> None:
    """The planted heads are the top ones, the best other head is far below the weakest of them."""
    ranked = rank_heads(scores)
    assert sorted(ranked[: len(planted)]) == sorted(planted)
    weakest, next_best = scores[ranked[len(planted) - 1]], scores[ranked[len(planted)]]
    assert weakest > 0.1
    assert abs(next_best) < weakest / 5


@pytest.mark.parametrize("seed", range(24))
def test_the_planted_circuit_is_found_exactly(seed: int) -> None:
    planted = plant(seed)
    engine = EffectEngine(DecoderRunner(planted.model), WorkBench(Ranks()), 4096)
    prompts = engine.solve("planted", induction_pairs(8, seed), "top1")
    assert len(prompts.keep) == 8

    # Activation patching: the receivers, the redundant backup among them.
    direct = engine.direct("planted", prompts)
    assert_exactly(direct, planted.receivers)
    receivers = top_heads(direct, count=8, share=0.05)
    assert receivers == sorted(planted.receivers)

    # Path patching: the senders, through the receivers' keys and nothing else.
    paths = engine.paths("planted", prompts, receivers)
    assert_exactly(paths["qkv"], planted.senders)
    assert_exactly(paths["k"], planted.senders)
    senders = tuple(zip(*planted.senders, strict=True))
    assert np.abs(np.stack([paths["q"][senders], paths["v"][senders]])).max() < 0.01

    # The total effect does not tell the two apart.
    assert_exactly(engine.total("planted", prompts), planted.receivers + planted.senders)

    # Attention mass: the decoy looks at the answer more sharply than any receiver, to no effect.
    mass = engine.attention_mass("planted", prompts)
    assert rank_heads(mass)[0] == planted.decoy
    assert abs(direct[planted.decoy]) < 0.01
