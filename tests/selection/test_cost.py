"""Costs equal the operations that the engine does."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_hydra.selection import knockout, noising, patching
from megatron_hydra.selection.cost import DecoderCost, Tokens
from megatron_hydra.selection.prompts import make_batches
from megatron_hydra.selection.runner import DecoderRunner, PairedStreams
from tests.selection.helpers import random_pairs, tiny_model


def counted(work: Callable[[], Any]) -> int:
    """Operations of all matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture
def runner() -> DecoderRunner:
    return DecoderRunner(tiny_model("qwen3", num_hidden_layers=6))


@pytest.mark.parametrize("first", [0, 40])
def test_both_streams(runner: DecoderRunner, first: int) -> None:
    (batch,) = make_batches(random_pairs([60, 60, 60], first=first), 10_000)
    cost, tokens = DecoderCost.of(runner), Tokens.of(batch)
    assert (tokens.pairs, tokens.prefix, tokens.rest) == (3, first, 62 - first)
    found = counted(lambda: PairedStreams(runner, batch).finish())
    # The last layer of the shared prefix stops at its keys and values.
    assert found == pytest.approx(cost.streams(tokens), rel=0.15)
    assert found <= cost.streams(tokens)
    if not first:
        assert found == cost.streams(tokens)


def test_a_shared_prefix_is_counted_once(runner: DecoderRunner) -> None:
    cost = DecoderCost.of(runner)
    assert cost.streams(Tokens(1, 50, 10)) < 0.7 * cost.streams(Tokens(1, 0, 60))


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_patched_runs_cost_the_layers_after_the_patch(runner: DecoderRunner, layer: int) -> None:
    (batch,) = make_batches(random_pairs([60, 60], first=20), 10_000)
    cost, tokens = DecoderCost.of(runner), Tokens.of(batch)

    def patch(heads: list[int]) -> int:
        wanted = [(layer, head) for head in heads]
        return counted(lambda: list(patching.total_effects(runner, batch, wanted, 10_000)))

    found = patch([0, 1, 2, 3, 4, 5]) - patch([0])
    expected = cost.patched(tokens, layer, 6) - cost.patched(tokens, layer, 1)
    # Of the last layer, only the answer's position is computed: most of it is saved.
    least = expected - 5 * cost._layer(2 * 40, 60)
    assert least <= found <= 1.1 * expected + 5 * cost._layer(2, 60)


def test_senders_cost_the_receivers_above_them(runner: DecoderRunner) -> None:
    (batch,) = make_batches(random_pairs([60, 60], first=20), 10_000)
    cost, tokens = DecoderCost.of(runner), Tokens.of(batch)

    def send(receivers: list[tuple[int, int]]) -> int:
        return counted(lambda: list(patching.path_effects(runner, batch, [1], receivers, 10_000)))

    two, four = [(2, 0), (3, 1)], [(2, 0), (3, 1), (4, 0), (5, 5)]
    found = send(four) - send(two)
    expected = cost.paths(tokens, [1] * 4) - cost.paths(tokens, [1] * 2)
    assert found == pytest.approx(expected, rel=0.15)


def test_receivers_cost_a_row_a_head_at_the_answer(runner: DecoderRunner) -> None:
    (batch,) = make_batches(random_pairs([60, 60, 60]), 10_000)
    cost, tokens = DecoderCost.of(runner), Tokens.of(batch)
    assert tokens.span == 3
    found = counted(lambda: noising.receiver_falls(runner, batch))
    assert found == pytest.approx(cost.receivers(tokens), rel=0.02)


@pytest.mark.parametrize("older", [[], [(4, 0), (4, 1), (5, 5)]], ids=["round 1", "round 2"])
def test_path_patching_costs_reading_and_passing_on(
    runner: DecoderRunner, older: list[tuple[int, int]]
) -> None:
    (batch,) = make_batches(random_pairs([60, 60], first=20), 10_000)
    cost, tokens = DecoderCost.of(runner), Tokens.of(batch)
    newest = [(2, 0), (3, 1), (3, 2)]
    counts = [collections.Counter(layer for layer, _ in heads) for heads in (newest, older)]

    def send(heads: list[int]) -> int:
        senders = [(1, head) for head in heads]
        return counted(
            lambda: list(noising.sender_falls(runner, batch, senders, newest, older, 10_000))
        )

    found = send([0, 1, 2, 3, 4]) - send([0])
    assert found == pytest.approx(cost.senders(tokens, 1, 4, *counts), rel=0.1)


def test_a_knockout_costs_the_clean_run(runner: DecoderRunner) -> None:
    (batch,) = make_batches(random_pairs([60, 60], first=20), 10_000)
    cost, tokens = DecoderCost.of(runner), Tokens.of(batch)
    found = counted(lambda: knockout.output_sums(runner, batch))
    assert found == pytest.approx(cost.clean_run(tokens), rel=0.02)
