"""Exact effects against brute force, and batches against one pair at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_hydra.selection import patching
from megatron_hydra.selection.prompts import PromptBatch, make_batches
from megatron_hydra.selection.runner import DecoderRunner
from tests.selection.brute_force import BruteForce
from tests.selection.helpers import random_pairs, tiny_model

RECEIVERS = [(1, 0), (1, 4), (2, 2), (2, 3), (2, 5)]
HEADS = [(layer, head) for layer in range(3) for head in range(6)]


def setup(family: str, first: int) -> tuple[DecoderRunner, PromptBatch, list[BruteForce]]:
    model = tiny_model(family)
    pairs = random_pairs([9, 14, 11], first=first)
    (batch,) = make_batches(pairs, 10_000)
    return DecoderRunner(model), batch, [BruteForce(model, pairs[i]) for i in batch.index]


@pytest.mark.parametrize("first", [0, 4, 8])
def test_baseline_is_the_model(family: str, first: int) -> None:
    runner, batch, brute = setup(family, first)
    result = patching.baseline(runner, batch)
    np.testing.assert_allclose(result.clean, [b.clean_m for b in brute], atol=1e-5)
    np.testing.assert_allclose(result.corrupted, [b.corrupted_m for b in brute], atol=1e-5)


@pytest.mark.parametrize("first", [0, 4])
def test_direct_and_total_equal_brute_force(family: str, first: int) -> None:
    runner, batch, brute = setup(family, first)
    direct = patching.direct_effects(runner, batch)
    total = {
        (layer, head): row
        for layer, heads, m in patching.total_effects(runner, batch, HEADS, tokens_per_batch=70)
        for head, row in zip(heads, m, strict=True)
    }
    for layer, head in HEADS:
        expected = [b.direct(layer, head) for b in brute]
        np.testing.assert_allclose(direct[layer, head], expected, atol=1e-5)
        expected = [b.total(layer, head) for b in brute]
        np.testing.assert_allclose(total[layer, head], expected, atol=1e-5)


@pytest.mark.parametrize("first", [0, 4])
def test_effects_of_layers_equal_brute_force(family: str, first: int) -> None:
    runner, batch, brute = setup(family, first)
    found = patching.layer_effects(runner, batch)
    expected = [[b.layer(layer) for b in brute] for layer in range(3)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_path_patching_equals_brute_force(family: str) -> None:
    runner, batch, brute = setup(family, first=3)
    results = dict(patching.path_effects(runner, batch, [0, 1], RECEIVERS, tokens_per_batch=80))
    assert sorted(results) == [0, 1]
    for layer, m in results.items():
        for head in range(6):
            column = head % len(brute)
            expected = [brute[column].path(layer, head, RECEIVERS, path) for path in patching.PATHS]
            np.testing.assert_allclose(m[:, head, column], expected, atol=1e-5)


def test_a_sender_with_no_receiver_above_it_has_no_effect() -> None:
    runner, batch, brute = setup("qwen3", first=0)
    ((layer, m),) = patching.path_effects(runner, batch, [2], RECEIVERS, tokens_per_batch=1000)
    assert layer == 2
    expected = torch.tensor([b.corrupted_m for b in brute]).expand_as(m)
    np.testing.assert_allclose(m, expected, atol=1e-5)


def test_attribution_equals_autograd_through_hooks(family: str) -> None:
    model = tiny_model(family)
    pairs = random_pairs([12, 15], first=2)
    (batch,) = make_batches(pairs, 10_000)
    estimate = patching.attribution_effects(DecoderRunner(model), batch)
    for column, i in enumerate(batch.index):
        brute = BruteForce(model, pairs[i])
        slopes = brute.slopes()
        for layer, head in HEADS:
            columns = slice(head * brute.head_dim, (head + 1) * brute.head_dim)
            change = brute.clean[f"z{layer}"] - brute.corrupted[f"z{layer}"]
            expected = (change * slopes[layer])[..., columns].sum().item()
            found = float(estimate[layer, head, column]) - brute.corrupted_m
            assert found == pytest.approx(expected, rel=5e-5, abs=2e-5)


def test_attention_mass_is_the_models_own_attention(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    pairs = random_pairs([12, 15], first=2)
    (batch,) = make_batches(pairs, 10_000)
    found = patching.attention_mass(DecoderRunner(model), batch)
    for column, i in enumerate(batch.index):
        clean = torch.tensor(pairs[i].clean)
        with torch.no_grad():
            attentions = model(clean[None], output_attentions=True).attentions
        here = clean == pairs[i].answer[0]
        for layer in range(3):
            expected = attentions[layer][0, :, -1][:, here].sum(-1)
            if here.any():
                np.testing.assert_allclose(found[layer, :, column], expected, atol=1e-5)
            else:
                assert found[layer, :, column].isnan().all()


def test_spreading_the_layers_over_devices_changes_nothing() -> None:
    runner, batch, _ = setup("llama", first=1)
    expected = patching.direct_effects(runner, batch)
    spread = DecoderRunner(tiny_model("llama"), devices=["cpu", "cpu"])
    assert torch.equal(patching.direct_effects(spread, batch), expected)
