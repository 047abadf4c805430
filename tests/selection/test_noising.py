"""The paper's effects compared with brute force: one forward per head with hooks, frozen attention."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_hydra.selection import noising, patching
from megatron_hydra.selection.prompts import PromptBatch, make_batches
from megatron_hydra.selection.runner import DecoderRunner
from tests.selection.brute_force import BruteForce
from tests.selection.helpers import random_pairs, tiny_model

LAYERS = 4
HEADS = [(layer, head) for layer in range(LAYERS) for head in range(6)]
RECEIVERS = [(3, 0), (3, 1), (2, 4), (1, 3)]
SENDERS = [(2, 0), (2, 5), (1, 1), (3, 4)]
"""Senders that a second round finds; one of them is above all receivers."""


def setup(family: str, first: int) -> tuple[DecoderRunner, PromptBatch, list[BruteForce]]:
    model = tiny_model(family, num_hidden_layers=LAYERS)
    pairs = random_pairs([9, 14, 11], first=first)
    (batch,) = make_batches(pairs, 10_000)
    return DecoderRunner(model), batch, [BruteForce(model, pairs[i]) for i in batch.index]


@pytest.mark.parametrize("first", [0, 4, 8])
def test_receivers_equal_brute_force(family: str, first: int) -> None:
    runner, batch, brute = setup(family, first)
    found = noising.receiver_falls(runner, batch, rows_per_pass=50)
    assert found.shape == (LAYERS, 6, 3)
    for layer, head in HEADS:
        expected = [b.clean_m - b.receiver(layer, head) for b in brute]
        np.testing.assert_allclose(found[layer, head], expected, atol=1e-5)
    assert found.abs().max() > 0.1  # the heads have effects


@pytest.mark.parametrize("older", [[], RECEIVERS], ids=["round 1", "round 2"])
@pytest.mark.parametrize("first", [0, 4])
def test_senders_equal_brute_force(family: str, first: int, older: list[tuple[int, int]]) -> None:
    runner, batch, brute = setup(family, first)
    newest = SENDERS if older else RECEIVERS
    results = noising.sender_falls(runner, batch, HEADS, newest, older, tokens_per_batch=120)
    found = {
        (layer, head): row
        for layer, heads, m in results
        for head, row in zip(heads, m, strict=True)
    }
    assert sorted(found) == [head for head in HEADS if head[0] < 3]
    largest = 0.0
    for number, (layer, head) in enumerate(found):
        column = number % len(brute)  # every head on one pair: brute force is slow
        b = brute[column]
        expected = b.clean_m - b.sender(layer, head, newest, older)
        np.testing.assert_allclose(found[layer, head][column], expected, atol=1e-5)
        largest = max(largest, abs(expected))
    assert largest > 0.05


def test_the_batch_size_does_not_change_the_effects() -> None:
    runner, batch, _ = setup("qwen3", first=2)
    few, many = (
        list(noising.sender_falls(runner, batch, HEADS, SENDERS, RECEIVERS, size))
        for size in (1, 100_000)
    )
    for (layer, heads, a), (other, same, b) in zip(few, many, strict=True):
        assert (layer, heads) == (other, same)
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_effects_of_a_layer_do_not_depend_on_the_other_measured_layers() -> None:
    """The bits are equal; otherwise a map would depend on the number of processes and on kills."""
    runner, batch, _ = setup("qwen3", first=2)
    every = noising.sender_falls(runner, batch, HEADS, SENDERS, RECEIVERS, 120)
    (alone,) = noising.sender_falls(runner, batch, HEADS[6:12], SENDERS, RECEIVERS, 120)
    (among,) = (result for result in every if result[0] == 1)
    assert alone[:2] == among[:2] == (1, list(range(6)))
    np.testing.assert_array_equal(alone[2], among[2])


def test_a_sender_without_a_receiver_above_it_is_omitted() -> None:
    runner, batch, _ = setup("llama", first=0)
    found = noising.sender_falls(runner, batch, HEADS, [(2, 1)], [], tokens_per_batch=1000)
    assert [layer for layer, _, _ in found] == [0, 1]
    assert not list(noising.sender_falls(runner, batch, HEADS, [(0, 1)], [], 1000))


def test_layers_on_several_devices() -> None:
    runner, batch, _ = setup("llama", first=1)
    spread = DecoderRunner(tiny_model("llama", num_hidden_layers=LAYERS), devices=["cpu", "cpu"])
    expected = noising.receiver_falls(runner, batch)
    np.testing.assert_array_equal(noising.receiver_falls(spread, batch), expected)
    assert patching.baseline(spread, batch).clean.shape == (3,)
