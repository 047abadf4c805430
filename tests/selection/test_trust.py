"""The report on a head map: the positive control and the knockout curve."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import HeadMap
from megatron_hydra.selection import SelectionOptions, knockout, knockout_curve, select_heads
from megatron_hydra.selection.interp import Measured
from megatron_hydra.selection.prompts import make_batches
from megatron_hydra.selection.runner import DecoderRunner
from megatron_hydra.selection.trust import agreement, split_half, ties
from tests.selection.brute_force import BruteForce
from tests.selection.helpers import byte_tokenizer, random_pairs, tiny_model
from tests.selection.planted import Planted, induction_pairs, plant
from tests.selection.test_tasks import Pairs
from tools import head_map as head_map_tool

OPTIONS = SelectionOptions(num_prompts=8, min_prompts=4)
TASK = Pairs("planted", induction_pairs(8, 0))


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant(0)


def measured(receiver: np.ndarray) -> Measured:
    """Two heads, no senders, one sub-probe."""
    pairs = receiver.shape[-1]
    return Measured({}, receiver, 0 * receiver, np.zeros(pairs, dtype=int), [])


def test_ties_begin_at_the_first_score_that_the_next_head_has_as_well() -> None:
    found = ties(np.array([[0.0, 0.7, 0.3], [0.3, 0.0, 0.0]]))
    assert (found["begin"], found["heads"]) == (2, 5)
    assert ties(np.array([[0.1, 0.2]]))["begin"] is None


def test_halves_agree_where_every_pair_says_the_same_and_not_where_they_are_noise() -> None:
    generator = np.random.default_rng(0)
    steady = np.repeat(generator.random((6, 8, 1)), 16, axis=-1)
    rows = split_half(measured(steady), budget=10, seed=0)
    assert [row["pairs"] for row in rows] == [1, 2, 3, 4, 6, 8]
    for row in rows:
        assert (row["rank_correlation"], row["overlap"]) == (pytest.approx(1), 1)
    noise = split_half(measured(generator.random((6, 8, 16))), budget=10, seed=0)
    assert max(abs(row["rank_correlation"]) for row in noise) < 0.3
    assert max(row["overlap"] for row in noise) < 0.5
    both = split_half(measured(steady + generator.normal(0, 0.5, (6, 8, 16))), budget=10, seed=0)
    assert both[0]["rank_correlation"] < both[-1]["rank_correlation"]


def test_heads_without_a_signal_share_a_rank() -> None:
    a = np.array([[0.5, 0.3, 0.009, 0.0]])
    b = np.array([[0.4, 0.2, 0.0, 0.008]])
    found = agreement(a, b, budget=3)
    assert found == {"rank_correlation": pytest.approx(1), "overlap": 1.0, "top": 2}


def test_knocking_out_equals_a_hook(family: str) -> None:
    """Means are over real tokens; a knocked-out head gives its mean at every token."""
    model = tiny_model(family)
    pairs = random_pairs([9, 14, 11], first=2)
    runner, (batch,) = DecoderRunner(model), make_batches(pairs, 10_000)
    sums, count = knockout.output_sums(runner, batch), knockout.num_tokens(batch)
    brute = {i: BruteForce(model, pairs[i]) for i in batch.index}
    assert count == sum(pair.num_tokens for pair in pairs)
    for layer in range(3):
        expected = sum(b.clean[f"z{layer}"][0].double().sum(0) for b in brute.values())
        torch.testing.assert_close(sums[layer].flatten(), expected, atol=1e-4, rtol=1e-4)
    heads, means = [(0, 1), (2, 0), (2, 5)], sums / count
    found = knockout.knock_out(runner, batch, heads, means)
    for column, i in enumerate(batch.index):
        assert brute[i].without(heads, means.float()) == pytest.approx(
            found.m[column].item(), abs=1e-5
        )
    intact = knockout.knock_out(runner, batch, [], means)
    np.testing.assert_allclose(intact.m, [brute[i].clean_m for i in batch.index], atol=1e-5)


def test_the_map_reports_the_reliability_of_its_scores(planted: Planted, caplog: Any) -> None:
    found = select_heads(planted.model, ratio="5:1", tasks=[TASK], options=OPTIONS)
    control = found.details["capabilities"]["planted"]["control"]
    assert control["can_fail"] and control["best"]["readout_lost"] > 0.1
    assert abs(control["random"]["readout_lost"]) < 0.05
    trust = found.details["trust"]
    circuit = planted.receivers + planted.senders
    assert trust["heads_with_signal"] == len(circuit)
    assert trust["ties"]["begin"] == len(circuit) + 1
    # One in each of five layers, and the circuit lies in fewer.
    layers = {layer for layer, _ in circuit}
    assert trust["chosen_without_signal"] == 5 - len(layers)
    gini = trust["capabilities"]["planted"]["gini_by_layer"]
    assert [value > 0 for value in gini] == [layer in layers for layer in range(5)]
    assert "does not fail" not in caplog.text
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_a_probe_that_cannot_fail_is_reported(
    planted: Planted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = knockout.knock_out
    monkeypatch.setattr(knockout, "knock_out", lambda r, b, heads, means: real(r, b, [], means))
    found = select_heads(planted.model, ratio="5:1", tasks=[TASK], options=OPTIONS)
    assert not found.details["capabilities"]["planted"]["control"]["can_fail"]
    assert "the probe of planted does not fail" in caplog.text


@pytest.fixture(scope="module")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = byte_tokenizer()
    tiny_model("qwen3", vocab_size=300, max_position_embeddings=1300).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_needles_of_other_lengths_are_compared_with(with_text: Path) -> None:
    options = SelectionOptions(
        num_prompts=4, min_prompts=1, probe_tokens=1024, solved="off", max_rounds=0, control=False
    )
    arguments = {"ratio": "5:1", "tasks": ["needle_single:haystack=noise", "induction"]}
    found = select_heads(with_text, options=options, **arguments)
    trust = found.details["trust"]["capabilities"]
    rows = trust["needle_single:haystack=noise"]["lengths"]
    # Twice the length exceeds the training length, and a quarter of it holds hardly more than the facts.
    assert [row["tokens"] for row in rows] == [256, 512]
    assert all(row["pairs"] and -1 <= row["rank_correlation"] <= 1 for row in rows)
    assert "lengths" not in trust["induction"]
    without = dataclasses.replace(options, stability=False)
    plain = select_heads(with_text, options=without, **arguments)
    assert plain.scores == found.scores
    assert "lengths" not in plain.details["trust"]["capabilities"]["needle_single:haystack=noise"]


def test_the_knockout_curve_falls_early_by_score_and_late_at_random(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, path = tmp_path / "model", tmp_path / "map.json"
    planted.model.save_pretrained(folder)
    rows = [
        {"clean": p.clean, "corrupted": p.corrupted, "answer": p.answer, "wrong_answer": p.wrong}
        for p in TASK.pairs
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    select_heads(folder, ratio="5:1", tasks=[TASK], options=OPTIONS, output=path)
    command = [
        "tool", "knockout", str(path), "--hf-path", str(folder), "--tasks",
        f"jsonl:{tmp_path / 'p.jsonl'}", "--heads", "0", "2", "5", "30",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    assert head_map_tool.main() == 0
    curve = json.loads((tmp_path / "map_knockout.json").read_text())
    assert [point["heads"] for point in curve["points"]] == [0, 2, 5, 30]
    intact, _, circuit, everything = curve["points"]
    assert intact["score"]["accuracy"] == 1 and intact["random"]["accuracy"] == [1, 1, 1]
    assert circuit["score"]["accuracy"] <= 0.25 < np.mean(circuit["random"]["accuracy"])
    assert everything["score"] == {k: v[0] for k, v in everything["random"].items()}
    assert (tmp_path / "map_knockout.png").read_bytes()[:4] == b"\x89PNG"
    assert "heads out  by score" in capsys.readouterr().out
    assert head_map_tool.main() == 2
    assert "exists; give --force" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["tool", "show", str(path)])
    assert head_map_tool.main() == 0
    said = capsys.readouterr().out
    assert "found        planted: 3 receivers, senders by round 2 + 0" in said
    assert "ties: from place 6 on (the effect without kappa" in said


def test_a_map_without_a_ranking_has_no_knockout_curve(planted: Planted, tmp_path: Path) -> None:
    planted.model.save_pretrained(tmp_path)
    whole = select_heads(tmp_path, ratio="5:1", strategy="layerwise")
    with pytest.raises(HydraError, match="layerwise gives no ranking"):
        knockout_curve(whole, str(tmp_path))
    drawn = select_heads(tmp_path, ratio="5:1", strategy="global_random")
    with pytest.raises(HydraError, match="--heads 31: give numbers from 0 to 30"):
        knockout_curve(drawn, str(tmp_path), counts=[31])
    assert isinstance(drawn, HeadMap)
