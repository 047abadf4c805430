"""SIGKILL at any moment: the run resumes from a complete checkpoint and ends like an undisturbed one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.forks import Forker
from tests.faults.runs import STEPS, Run, differences, differences_so_far, start_run
from tests.faults.worker import MAIN_ONLY, SAVE_POINTS, Fault

KILLS = 20
BY_AGENT = 5
"""Every fifth attempt, and the last, go through launch/agent.py and torchrun."""


def _kill(run: Run, whole: Run, fault: Fault, forker: Forker | None) -> None:
    """One attempt that ends by SIGKILL and leaves a state that a run can resume from."""
    ended = run.attempt(fault, forker=forker)
    assert ended.fault_happened, ended.output[-4000:]
    assert ended.status not in (0, 85), ended.output[-4000:]
    assert ended.left_over == []
    assert differences_so_far(run, whole) == [], fault


def _finish(run: Run, whole: Run) -> None:
    ended = run.attempt()
    assert ended.status == 0, ended.output[-4000:]
    assert differences(run, whole) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_between_saves(
    inputs: Path, undisturbed: Callable[[int], Run], forker: Forker, tmp_path: Path, table
) -> None:
    whole, random_numbers = undisturbed(STEPS), random.Random(6)
    run = start_run(inputs, tmp_path, checkpoint={"interval": 2, "keep": 0})
    victims: Counter[str] = Counter()
    for i in range(KILLS):
        done = max(run.steps(), default=0)
        everyone = random_numbers.random() < 0.5
        step = min(done + random_numbers.randint(1, 8), STEPS)
        fault = Fault("kill", step, random_numbers.randrange(2), everyone)
        _kill(run, whole, fault, forker if i % BY_AGENT else None)
        victims["all ranks" if everyone else "one rank"] += 1
    _finish(run, whole)
    table(
        "SIGKILL before a random step: " + _counted(victims), KILLS, KILLS,
        "resumed from a complete checkpoint; bit-equal to the undisturbed run",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_twenty_kills_during_saves(
    asynchronous: bool,
    inputs: Path,
    undisturbed: Callable[[int], Run],
    forker: Forker,
    tmp_path: Path,
    table,
) -> None:
    whole, random_numbers = undisturbed(STEPS), random.Random(7)
    run = start_run(
        inputs, tmp_path, checkpoint={"interval": 2, "keep": 1, "asynchronous": asynchronous}
    )
    points = [SAVE_POINTS[i % len(SAVE_POINTS)] for i in range(KILLS)]
    for i, point in enumerate(points):
        rank = 0 if point in MAIN_ONLY else random_numbers.randrange(2)
        # The second save of an attempt has an older checkpoint to delete.
        save = 2 if point == "retaining" else random_numbers.randint(1, 2)
        everyone = random_numbers.random() < 0.5
        fault = Fault("kill_in_save", save, rank, everyone, point)
        _kill(run, whole, fault, forker if i % BY_AGENT else None)
    _finish(run, whole)
    kind = "in the background" if asynchronous else "at the step boundary"
    table(
        f"SIGKILL while saving {kind}: " + _counted(Counter(points)), KILLS, KILLS,
        "restarted from a complete checkpoint; bit-equal to the undisturbed run",
    )  # fmt: skip


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count}× {name}" for name, count in counter.items())


@pytest.mark.slow
def test_a_kill_while_saving_in_the_background(
    inputs: Path, undisturbed: Callable[[int], Run], forker: Forker, tmp_path: Path
) -> None:
    whole = undisturbed(8)
    run = start_run(
        inputs, tmp_path, 8, checkpoint={"interval": 2, "keep": 1, "asynchronous": True}
    )
    _kill(run, whole, Fault("kill_in_save", 2, 1, False, "writing"), forker)
    assert run.steps() == [2]
    _finish(run, whole)
