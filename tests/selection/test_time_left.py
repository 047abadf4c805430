"""The estimate of the time left is accurate for the recorded units of a real selection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hydra.ranks import Ranks
from megatron_hydra.selection import effects, patching
from megatron_hydra.selection.effects import EffectEngine
from megatron_hydra.selection.prompts import PromptBatch
from megatron_hydra.selection.runner import DecoderRunner
from megatron_hydra.selection.time_left import Stage, TimeLeft, in_words
from megatron_hydra.selection.work import WorkBench
from tests.selection.helpers import random_pairs, tiny_model

RECORDED = [Path(__file__).with_name("recorded_default.json")]
"""Selections with SmolLM2-135M-Instruct on one CPU core, by ``record_chunks.py``."""


def replay(events: list[list[Any]]) -> list[tuple[float, float]]:
    """The estimates and the true times left, after every unit from the 60th second on."""
    whole = sum(event[-1] for event in events if event[0] in ("observe", "done"))
    left, clock, said = TimeLeft(), 0.0, []
    for what, *rest in events:
        if what == "plan":
            kind, task, cost = rest
            left.plan(Stage(kind, task), cost)
        elif what == "drop":
            left.drop(rest[0])
        else:
            *stage, cost, seconds = rest
            clock += seconds
            if what == "observe":
                left.observe(stage[0], cost, seconds)
            else:
                left.done(Stage(*stage), cost, seconds)
            said.append((clock, left.seconds() or 0.0))
    return [(estimate, whole - clock) for clock, estimate in said if clock >= 60.0]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_after_a_minute_the_estimate_is_within_a_factor_of_two(path: Path) -> None:
    events = json.loads(path.read_text())
    judged = [pair for pair in replay(events) if pair[1] >= 30.0]
    assert len(judged) > 100
    ratios = [estimate / true for estimate, true in judged]
    assert 0.5 < min(ratios) <= max(ratios) < 2.0


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_estimates_with_equal_units_would_be_wrong(path: Path) -> None:
    """A poor estimate exceeds the bound above."""
    events = json.loads(path.read_text())
    counts: dict[tuple[str, ...], int] = {}
    for what, *rest in events:
        if what == "done":
            counts[tuple(rest[:2])] = counts.get(tuple(rest[:2]), 0) + 1
    for event in events:
        if event[0] == "plan":
            event[3] = float(counts.get(tuple(event[1:3]), 0)) if event[3] else 0.0
        elif event[0] in ("observe", "done"):
            event[-2] = 1.0
    ratios = [e / t for e, t in replay(events) if t >= 30.0]
    assert not 0.5 < min(ratios) <= max(ratios) < 2.0


def test_there_is_no_estimate_before_a_timing() -> None:
    left = TimeLeft()
    left.plan(Stage("total", "a"), 10.0)
    assert left.seconds() is None
    assert left.share_done == 0.0


def test_every_kind_has_its_own_pace_and_the_first_unit_does_not_count() -> None:
    left = TimeLeft()
    left.plan(Stage("direct", "a"), 4.0)
    left.plan(Stage("total", "a"), 100.0)
    left.done(Stage("direct", "a"), 1.0, 50.0)  # warming up
    assert left.seconds() == pytest.approx(50.0 * 103)
    left.done(Stage("direct", "a"), 1.0, 2.0)
    assert left.seconds() == pytest.approx(2.0 * 102)
    left.observe("total", 1.0, 0.5)
    assert left.seconds() == pytest.approx(2.0 * 2 + 0.5 * 100)
    assert left.seconds(kinds=("total",)) == pytest.approx(50.0)
    assert left.share_done == pytest.approx(52.5 / (52.5 + 54.0))


def test_a_gpu_is_timed_by_the_second_call_on_the_largest_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A small batch measures the time of launches: it once predicted 6 hours for 5 minutes."""
    tasks = [random_pairs([12, 12]), random_pairs([60, 60, 60])]
    tokens: list[int] = []

    def counted(runner: DecoderRunner, batch: PromptBatch) -> None:
        tokens.append(batch.clean.numel())

    monkeypatch.setattr(patching, "baseline", counted)
    monkeypatch.setattr(effects, "SAMPLE_COST", 1.0)  # the smallest batch is the nearest to it

    def calls_on(device: str) -> list[int]:
        engine = EffectEngine(DecoderRunner(tiny_model("qwen3")), WorkBench(Ranks()), 4096)
        monkeypatch.setattr(engine.runner, "device_of", lambda layer: torch.device(device))
        monkeypatch.setattr(engine.runner, "wait", lambda: None)
        tokens.clear()
        engine.time_samples(tasks, ["baseline"])
        assert engine.bench.time_left.spent > 0
        return list(tokens)

    assert calls_on("cpu") == [26, 26]  # the first is not timed
    assert calls_on("cuda") == [186, 186, 186]


def test_processes_share_the_remaining_work() -> None:
    left = TimeLeft(processes=4)
    left.plan(Stage("direct", "a"), 8.0)
    left.plan(Stage("direct", "b"), 8.0)
    left.done(Stage("direct", "a"), 1.0, 3.0)
    assert left.seconds() == pytest.approx(3.0 * (4 + 8) / 4)
    assert left.seconds(task="b") == pytest.approx(6.0)
    left.drop("b")
    assert left.seconds() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (89, "89 s"),
        (100, "2 min"),
        (3600, "60 min"),
        (7210, "2 h"),
        (11400, "3 h 10 min"),
    ],
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert in_words(seconds) == text
