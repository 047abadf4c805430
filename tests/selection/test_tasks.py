"""The tasks of a selection: named tasks, and the default tasks that the model solves."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import HeadMap
from megatron_hydra.selection import (
    SelectionOptions,
    capabilities,
    noising,
    patching,
    select_heads,
    tasks,
)
from megatron_hydra.selection.plots import draw_head_map
from tests.selection.helpers import Pairs
from tests.selection.planted import Planted, induction_pairs, plant
from tools import head_map as head_map_tool

OPTIONS = SelectionOptions(num_prompts=32, min_prompts=8, max_rounds=0, control=False)


GOOD = Pairs("good", induction_pairs(32, 0))
BAD = Pairs(
    "bad",
    [dataclasses.replace(p, answer=p.wrong, wrong=p.answer) for p in induction_pairs(32, 1)],
)
SOME = Pairs("some", BAD.pairs[:28] + induction_pairs(4, 2))


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant(0)


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces the default tasks."""
    return lambda *wanted: monkeypatch.setattr(tasks, "DEFAULT_TASKS", wanted)


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of every run without intervention."""
    sizes: list[int] = []
    real = patching.baseline
    monkeypatch.setattr(
        patching, "baseline", lambda r, b: (sizes.append(len(b.index)), real(r, b))[1]
    )
    return sizes


def select(planted: Planted, options: SelectionOptions = OPTIONS, **arguments: Any) -> HeadMap:
    return select_heads(planted.model, ratio="5:1", options=options, **arguments)


def test_unsolved_default_tasks_are_skipped(
    planted: Planted,
    defaults: Any,
    baselines: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    defaults(BAD, GOOD, SOME, "facts")  # the model has no tokenizer
    options = dataclasses.replace(OPTIONS, tokens_per_batch=440)
    found = select(planted, options, output=tmp_path / "map.json")
    assert list(found.scores) == ["good"]
    assert found.scores == select(planted, options, tasks=[GOOD]).scores
    left_out = found.details["left_out"]
    assert {task: (facts["drawn"], facts["solved"]) for task, facts in left_out.items()} == {
        "facts": (0, 0), "bad": (32, 0), "some": (32, 4),
    }  # fmt: skip
    assert "generates text" in left_out["facts"]["reason"]
    assert "task some is skipped: the model solves 4 of 32 prompts, at least 8" in caplog.text
    assert sum(baselines) == 4 * 32  # each prompt once, although the solve check used some
    assert HeadMap.load(tmp_path / "map.json").to_dict() == found.to_dict()

    lines: list[str] = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.supxlabel", lambda _, text, **__: lines.append(text)
    )
    draw_head_map(found, tmp_path / "map")
    assert len(lines) == 2  # the capabilities and the unified score
    for expected in ("left out: some (solved 4 of 32)", "left out: facts (no prompts)"):
        assert all(expected in text for text in lines)
    monkeypatch.setattr(sys, "argv", ["tool", "show", str(tmp_path / "map.json")])
    assert head_map_tool.main() == 0
    assert "left out     bad: the model solves 0 of 32" in capsys.readouterr().out


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a capability of several tasks."""

    def make(name: str, *members: Pairs) -> None:
        for member in members:
            monkeypatch.setitem(capabilities._REGISTERED, member.name, lambda *_, m=member: m)
        monkeypatch.setitem(capabilities.GROUPS, name, tuple(m.name for m in members))

    return make


def test_a_capability_of_several_tasks_has_them_as_sub_probes(planted: Planted, group: Any) -> None:
    """The model need not solve all of them, even if the capability is named."""
    other = dataclasses.replace(GOOD, name="other", pairs=induction_pairs(32, 5))
    group("both", GOOD, other, BAD)
    found = select(planted, tasks=["both"])
    assert list(found.scores) == ["both"]
    assert list(found.details["left_out"]) == ["bad"]
    facts = found.details["capabilities"]["both"]
    assert (facts["probes"], facts["sub_probes"]) == (["good", "other"], 2)
    drawn = {task: facts["drawn"] for task, facts in found.details["prompts"].items()}
    assert drawn == {"good": 11, "other": 11}  # 32 pairs for three tasks
    # Other strategies score every task; tasks of a capability share its weight.
    plain = SelectionOptions(num_prompts=32)
    by_mass = select(planted, plain, tasks=["both", Pairs("third", GOOD.pairs)],
                     strategy="attention_mass")  # fmt: skip
    assert list(by_mass.scores) == ["good", "other", "third"]
    expected = sum(
        weight * np.array(by_mass.scores[task])
        for task, weight in (("good", 0.25), ("other", 0.25), ("third", 0.5))
    )
    np.testing.assert_allclose(by_mass.details["unified_score"], expected)


def test_a_named_capability_without_a_solved_task_is_an_error(planted: Planted, group: Any) -> None:
    group("neither", BAD, dataclasses.replace(SOME, pairs=SOME.pairs[:28]))
    with pytest.raises(HydraError, match=r"--tasks neither: none of its tasks .* bad: the model"):
        select(planted, tasks=["neither", GOOD])


@pytest.mark.parametrize("way", ["task", "weight"])
def test_a_named_task_must_be_solved(
    planted: Planted, defaults: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The check comes before all other measurements."""
    defaults(GOOD, SOME)
    monkeypatch.setattr(noising, "receiver_falls", None)
    weighted = dataclasses.replace(OPTIONS, task_weights={"some": 0.5})
    given = {"tasks": [GOOD, SOME]} if way == "task" else {"options": weighted}
    with pytest.raises(HydraError, match=r"--tasks some: the model solves 4 of 32 prompts.*remove"):
        select(planted, **given)


def test_an_unsolved_selection_fails_after_a_few_prompts(
    planted: Planted, defaults: Any, baselines: list[int]
) -> None:
    more = [dataclasses.replace(BAD, name=f"bad {i}") for i in range(4)]
    defaults(*more)
    options = dataclasses.replace(OPTIONS, tokens_per_batch=110)  # one pair for each batch
    with pytest.raises(
        HydraError, match=r"no prompt of any task \(solve check: bad 0 0 of 6, bad 1"
    ):
        select(planted, options)
    assert sum(baselines) == 4 * 6  # 24 in all
    baselines.clear()
    with pytest.raises(HydraError, match="bad 0 of 24"):
        select(planted, options, tasks=[BAD])
    assert sum(baselines) == tasks.FEW_IN_ALL


def test_too_little_solved_of_every_default_task(planted: Planted, defaults: Any) -> None:
    defaults(SOME)
    with pytest.raises(HydraError, match="no default task is solved often enough: some: the model"):
        select(planted)


def test_no_default_task_has_prompts(planted: Planted, defaults: Any) -> None:
    defaults("facts", "code")
    with pytest.raises(
        HydraError, match=r"none of the default tasks .*\(facts; code\).*jsonl:PATH"
    ):
        select(planted)


def test_attention_mass_skips_tasks_without_answers_in_the_prompt(
    planted: Planted, defaults: Any
) -> None:
    absent = [next(t for t in range(16) if t not in p.clean + p.corrupted) for p in GOOD.pairs]
    pairs = [dataclasses.replace(p, answer=(a,)) for p, a in zip(GOOD.pairs, absent, strict=True)]
    defaults(GOOD, Pairs("nowhere", pairs))
    options = SelectionOptions(num_prompts=32, solved="off", min_prompts=1)
    found = select(planted, options, strategy="attention_mass")
    assert list(found.scores) == ["good"]
    assert "needs answers that occur" in found.details["left_out"]["nowhere"]["reason"]


def test_the_expected_time_is_shown_with_options_that_shorten_it(
    planted: Planted,
    defaults: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    defaults(GOOD, BAD)
    options = dataclasses.replace(OPTIONS, max_rounds=2, control=True, tokens_per_batch=440)
    quiet = select(planted, options)
    assert capsys.readouterr().err == ""
    assert select(planted, options, show_progress=True).to_dict() == quiet.to_dict()
    said = capsys.readouterr().err
    # Two tasks: twelve prompts of each, in batches of four.
    assert "good  12 of 12  about" in said
    assert "bad   0 of 12   nothing if it is skipped" in said
    assert "in all about" in said
    assert "--num-prompts" not in said
    monkeypatch.setattr(tasks, "LONG", 0.0)
    select(planted, options, show_progress=True)
    said = capsys.readouterr().err
    assert "if every prompt counts, in all about" in said
    for option in ("--max-rounds 1", "--max-rounds 0", "--num-prompts 8"):
        assert f"{option} makes it about" in said
    former = SelectionOptions(
        num_prompts=32, effects=("direct", "total"), attribution=True, tokens_per_batch=440
    )
    select(planted, former, strategy="interp_denoise", show_progress=True)
    said = capsys.readouterr().err
    for option in ("--effects direct", "--num-prompts 8", "no --attribution"):
        assert f"{option} makes it about" in said
