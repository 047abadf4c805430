"""The engine finds planted circuits at random places; attention mass does not find them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_hydra.ranks import Ranks
from megatron_hydra.selection import interp
from megatron_hydra.selection.effects import EffectEngine, top_heads
from megatron_hydra.selection.importance import SIGNAL
from megatron_hydra.selection.prompts import PromptPair
from megatron_hydra.selection.ranking import rank_heads
from megatron_hydra.selection.runner import DecoderRunner
from megatron_hydra.selection.work import WorkBench
from tests.selection.planted import (
    EVEN,
    ODD,
    induction_pairs,
    pairs_asking,
    pairs_of_three,
    pairs_two_behind,
    plant,
    plant_chain,
    plant_specialists,
)


def assert_exactly(scores: np.ndarray, planted: list[tuple[int, int]]) -> None:
    """The planted heads are at the top; the best other head is far below the weakest of them."""
    ranked = rank_heads(scores)
    assert sorted(ranked[: len(planted)]) == sorted(planted)
    weakest, next_best = scores[ranked[len(planted) - 1]], scores[ranked[len(planted)]]
    assert weakest > 0.1
    assert abs(next_best) < weakest / 5


def measured(
    model: torch.nn.Module, tasks: dict[str, list[PromptPair]], max_rounds: int = 3
) -> interp.Measured:
    """The heads that the paper's scoring finds for one capability."""
    engine = EffectEngine(DecoderRunner(model), WorkBench(Ranks()), 4096)
    prompts = {task: engine.solve(task, pairs, "top1") for task, pairs in tasks.items()}
    assert all(len(solved.keep) == len(solved.pairs) for solved in prompts.values())
    return interp.measure(engine, {"planted": list(tasks)}, prompts, max_rounds)["planted"]


def heads_with_signal(scores: np.ndarray) -> list[tuple[int, int]]:
    return [(int(layer), int(head)) for layer, head in np.argwhere(scores > SIGNAL)]


@pytest.mark.parametrize("seed", range(24))
def test_the_papers_scoring_finds_the_planted_circuit_exactly(seed: int) -> None:
    planted = plant(seed)
    found = measured(planted.model, {"planted": induction_pairs(8, seed)})
    assert found.receivers == sorted(planted.receivers)
    assert found.rounds == [sorted(planted.senders), []]
    importance = found.importance
    # The backup has half the strength of the two others. Effects add up, because MLPs are empty.
    shares = sorted(importance.receiver[receiver] for receiver in planted.receivers)
    np.testing.assert_allclose(shares, [0.2, 0.4, 0.4], atol=0.01)
    assert heads_with_signal(importance.score) == sorted(planted.receivers + planted.senders)
    assert (importance.kappa[importance.score > SIGNAL] == 1).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_sender_to_a_sender_is_found_in_the_second_round(seed: int) -> None:
    model, first, second, receiver = plant_chain(seed)
    tasks = {"planted": pairs_two_behind(8, seed)}
    found = measured(model, tasks)
    assert (found.receivers, found.rounds) == ([receiver], [[second], [first], []])
    assert heads_with_signal(found.importance.score) == sorted([first, second, receiver])
    assert min(found.importance.sender[head] for head in (first, second)) > 0.9
    one_round = measured(model, tasks, max_rounds=1)
    assert one_round.rounds == [[second]]
    assert one_round.importance.score[first] == 0
    assert measured(model, tasks, max_rounds=0).rounds == []


def test_a_head_that_gives_the_second_token_of_an_answer_is_found() -> None:
    model, sender, first, second = plant_specialists(backup=False)
    pairs = pairs_of_three(8, seed=0)
    found = measured(model, {"planted": pairs})
    assert (found.receivers, found.rounds) == ([first, second], [[sender], []])
    one_token = [dataclasses.replace(p, answer=p.answer[:1], wrong=p.wrong[:1]) for p in pairs]
    assert measured(model, {"planted": one_token}).receivers == [first]


def test_a_backup_head_is_found_by_the_union_over_sub_probes() -> None:
    """The backup is silent if the other receiver answers, also while that one is patched."""
    model, sender, first, backup = plant_specialists(backup=True)
    works, fails = pairs_asking(EVEN, 4, seed=0), pairs_asking(ODD, 4, seed=0)
    found = measured(model, {"works": works, "fails": fails})
    assert (found.receivers, found.rounds) == ([first, backup], [[sender], []])
    kappa = found.importance.kappa
    assert (kappa[first], kappa[backup], kappa[sender]) == (0.5, 0.5, 1.0)
    assert measured(model, {"works": works}).receivers == [first]


@pytest.mark.parametrize("seed", range(24))
def test_our_former_scoring_finds_the_planted_circuit_exactly(seed: int) -> None:
    planted = plant(seed)
    engine = EffectEngine(DecoderRunner(planted.model), WorkBench(Ranks()), 4096)
    prompts = engine.solve("planted", induction_pairs(8, seed), "top1")
    assert len(prompts.keep) == 8

    # Activation patching finds the receivers, also the redundant backup.
    direct = engine.direct("planted", prompts)
    assert_exactly(direct, planted.receivers)
    receivers = top_heads(direct, count=8, share=0.05)
    assert receivers == sorted(planted.receivers)

    # Path patching finds the senders, through the receivers' keys only.
    paths = engine.paths("planted", prompts, receivers)
    assert_exactly(paths["qkv"], planted.senders)
    assert_exactly(paths["k"], planted.senders)
    senders = tuple(zip(*planted.senders, strict=True))
    assert np.abs(np.stack([paths["q"][senders], paths["v"][senders]])).max() < 0.01

    # The total effect does not tell the two apart.
    assert_exactly(engine.total("planted", prompts), planted.receivers + planted.senders)

    # Attention mass: the decoy attends to the answer more sharply than any receiver, without effect.
    mass = engine.attention_mass("planted", prompts)
    assert rank_heads(mass)[0] == planted.decoy
    assert abs(direct[planted.decoy]) < 0.01
