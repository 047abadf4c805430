"""A fault on one rank: all ranks act together, or all end within a given time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hydra.checkpoint import store
from megatron_hydra.reporting import EVENTS_FILE
from megatron_hydra.training.run_folder import step_folders
from tests.faults.forks import Forker
from tests.faults.runs import Run, differences, same_bits, start_run
from tests.faults.worker import Fault
from tests.training import tiny

pytestmark = pytest.mark.timeout(1800)  # on a busy machine, an attempt takes minutes

TIMEOUT = 8
QUICK = {"timeout_seconds": TIMEOUT}


def _events(run: Run, name: str) -> list[dict]:
    lines = (run.output / EVENTS_FILE).read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == name]


def test_a_hung_rank_ends_the_job(inputs: Path, tmp_path: Path, forker: Forker, table) -> None:
    run = start_run(inputs, tmp_path, 40, faults=QUICK, checkpoint={"interval": 2})
    ended = run.attempt(Fault("hang", 4, 1), forker=forker)
    _assert_gone_with_stacks(ended)
    assert "_hang" in ended.output  # the place where rank 1 hung
    assert "train_step" in ended.output
    store.verify_checkpoint(store.resolve_checkpoint(run.checkpoints))
    table(
        f"a rank hangs (faults.timeout_seconds={TIMEOUT})", 1, 1,
        f"all processes have ended {ended.seconds_after_fault:.0f} s later, non-zero exit, stacks of "
        "both ranks",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, True], ids=["one", "both"])
def test_a_dead_rank_ends_the_job(everyone: bool, inputs: Path, tmp_path: Path, table) -> None:
    run = start_run(inputs, tmp_path, 40, faults={"timeout_seconds": 30})
    ended = run.attempt(Fault("kill", 4, 1, everyone))
    assert ended.fault_happened
    assert ended.status == 137  # 128 + SIGKILL, from the rank that died first
    assert ended.left_over == []
    assert "Timeout (" not in ended.output  # no rank had to wait for the watchdog
    who = "both ranks die" if everyone else "a rank dies"
    table(
        who, 1, 1, f"all processes have ended {ended.seconds_after_fault:.0f} s later, status 137"
    )


@pytest.mark.slow
def test_a_rank_that_hangs_under_torchrun(inputs: Path, tmp_path: Path, table) -> None:
    run = start_run(inputs, tmp_path, 40, faults=QUICK)
    ended = run.attempt(Fault("hang", 4, 0))
    _assert_gone_with_stacks(ended)
    table(
        f"a rank hangs under launch/agent.py (faults.timeout_seconds={TIMEOUT})", 1, 1,
        f"all processes have ended {ended.seconds_after_fault:.0f} s later, non-zero exit, stacks",
    )  # fmt: skip


def _assert_gone_with_stacks(ended) -> None:
    """The watchdog ends it: the hung rank would sleep longer than an attempt may take."""
    assert ended.fault_happened, ended.output[-3000:]
    assert ended.status not in (0, 85)
    assert ended.left_over == []
    assert f"Timeout (0:00:{TIMEOUT:02d})" in ended.output
    assert "Thread 0x" in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan", "spike"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_step_on_one_rank_is_skipped_on_all(
    kind: str, rank: int, inputs: Path, tmp_path: Path, forker: Forker, table
) -> None:
    faults = {"spike_factor": 5, "spike_window": 3}
    run = start_run(inputs, tmp_path, 9, faults=faults, checkpoint={"interval": 1, "keep": 0})
    ended = run.attempt(Fault(kind, 6, rank), forker=forker)
    assert ended.status == 0, ended.output[-3000:]
    assert ended.fault_happened
    lines = tiny.read_metrics(run.output)
    assert [line["step"] for line in lines if line.get("skipped")] == [6]
    assert 6 not in run.steps()
    (event,) = _events(run, "skip")
    fed = [steps[6] for steps in run.samples()]
    assert event["samples"] == sorted(sample for samples in fed for sample in samples)
    assert all(str(samples) in ended.output for samples in fed)  # every rank logs its own
    # The bad step changed neither weights nor optimizer.
    before, after = (tiny.everything(run.checkpoints / f"step_0000000{s}") for s in (5, 7))
    assert all(t.isfinite().all() for t in after.values() if t.is_floating_point())
    same = start_run(inputs, tmp_path / "again", 9, faults=faults, checkpoint={"interval": 6})
    assert same.attempt(Fault(kind, 6, rank), forker=forker).status == 0
    assert differences(same, run) == []
    moments = [key for key in before if "exp_avg" in key]
    assert moments
    assert not all(same_bits(before[key], after[key]) for key in moments)  # step 7 was applied
    table(
        f"{'NaN' if kind == 'nan' else 'a loss 5 times the usual'} on rank {rank}", 1, 1,
        "both ranks skip the step; samples are logged; no checkpoint of this step",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan", "spike"])
def test_a_bad_step_on_one_rank_can_stop_all(
    kind: str, inputs: Path, tmp_path: Path, forker: Forker, table
) -> None:
    faults = {"spike_factor": 5, "spike_window": 3, "max_skipped_steps": 0}
    run = start_run(inputs, tmp_path, 9, faults=faults, checkpoint={"interval": 1, "keep": 0})
    ended = run.attempt(Fault(kind, 6, 1), forker=forker)
    assert ended.status == 2
    assert ended.output.count("faults.max_skipped_steps is 0; the last checkpoint is good") == 2
    assert run.steps() == [1, 2, 3, 4, 5]
    store.verify_checkpoint(store.resolve_checkpoint(run.checkpoints))
    again = run.attempt(forker=forker)  # only this attempt had the fault: the same command resumes
    assert again.status == 0
    table(
        f"{'NaN' if kind == 'nan' else 'a spike'} on one rank, faults.max_skipped_steps=0", 1, 1,
        "both ranks end with status 2; the last checkpoint is good and the run resumes from it",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all(
    asynchronous: bool, rank: int, inputs: Path, undisturbed: Callable[[int], Run],
    tmp_path: Path, forker: Forker, table,
) -> None:  # fmt: skip
    run = start_run(
        inputs, tmp_path, 8, checkpoint={"interval": 2, "keep": 0, "asynchronous": asynchronous}
    )
    ended = run.attempt(Fault("signal", 5, rank), forker=forker)
    assert ended.status == 85, ended.output[-3000:]
    (stop,) = _events(run, "stop")
    # The background save of step 4 may still be running: a stop saves once.
    assert max(run.steps()) == stop["saved_step"] in ((4, 5) if asynchronous else (5,))
    assert run.attempt(forker=forker).status == 0
    # The undisturbed run has no checkpoint of step 5; every other number must agree.
    if stop["saved_step"] == 5:
        (run.checkpoints / "step_00000005").rename(tmp_path / "stopped-here")
    assert differences(run, undisturbed(8)) == []
    kind = ", saving in the background" if asynchronous else ""
    table(
        f"SIGTERM only to rank {rank}{kind}",
        1,
        1,
        "both save once and exit with 85; bit-equal after resuming",
    )


SIGNALS_IN_SAVES = [("planned", 1), ("written", 1), ("sealed", 0), ("pointed", 0)]
"""Points of a save, and the rank that gets the signal at this point."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "rank", "asynchronous"),
    [
        pytest.param(
            point, rank, asynchronous,
            id=f"{point}-{'async' if asynchronous else 'sync'}",
        )
        for point, rank in SIGNALS_IN_SAVES
        for asynchronous in (False, True)
    ],
)  # fmt: skip
def test_a_signal_in_a_save_stops_all(
    point: str, rank: int, asynchronous: bool, inputs: Path, undisturbed: Callable[[int], Run],
    tmp_path: Path, forker: Forker, table,
) -> None:  # fmt: skip
    run = start_run(
        inputs, tmp_path, 8, checkpoint={"interval": 2, "keep": 0, "asynchronous": asynchronous}
    )
    ended = run.attempt(Fault("signal_in_save", 1, rank, point=point), forker=forker)
    assert ended.fault_happened, ended.output[-3000:]
    assert ended.status == 85, ended.output[-3000:]
    assert ended.left_over == []
    assert run.steps()[0] == 2  # the disturbed save
    for folder in step_folders(run.checkpoints):
        store.verify_checkpoint(folder)
    (stop,) = _events(run, "stop")
    assert max(run.steps()) == stop["saved_step"] <= stop["step"] < 8
    if not asynchronous:
        assert run.steps() == [2]  # no further step, no second save
    assert run.attempt(forker=forker).status == 0
    for step in set(run.steps()) - {2, 4, 6, 8}:  # that of the stop
        (run.checkpoints / f"step_{step:08d}").rename(tmp_path / f"stopped-at-{step}")
    assert differences(run, undisturbed(8)) == []
    kind = "in the background" if asynchronous else "at the step boundary"
    table(
        f"SIGTERM to rank {rank} while saving {kind}: {point}", 1, 1,
        "the save is completed, both exit with 85; bit-equal after resuming",
    )  # fmt: skip


@pytest.mark.slow
def test_no_rank_leaves_before_the_log_is_closed(
    inputs: Path, tmp_path: Path, forker: Forker
) -> None:
    """Otherwise a launcher could end rank 0 while it still sends its log."""
    run = start_run(inputs, tmp_path, 2)
    ended = run.attempt(Fault("slow_close", 1, 0), forker=forker)
    assert ended.status == 0, ended.output[-3000:]
    assert ended.fault_happened
    assert "left before" not in ended.output


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(
    inputs: Path, tmp_path: Path, forker: Forker, table
) -> None:
    run = start_run(inputs, tmp_path, 40, checkpoint={"interval": 2})
    ended = run.attempt(Fault("signal_twice", 4, 1), forker=forker)
    assert ended.status == 138  # 128 + SIGUSR1
    assert "second signal (SIGUSR1): exiting at once" in ended.output
    assert ended.left_over == []
    assert "Timeout (" not in ended.output
    store.verify_checkpoint(store.resolve_checkpoint(run.checkpoints))
    table(
        "a second signal, seconds later, to a rank that cannot finish its step", 1, 1,
        f"exits at once (138); all processes have ended {ended.seconds_after_fault:.0f} s after the first",
    )  # fmt: skip


@pytest.mark.slow
def test_the_time_limit_of_the_job_stops_all(
    inputs: Path, undisturbed: Callable[[int], Run], tmp_path: Path, forker: Forker, table
) -> None:
    """The time limit comes from SLURM's environment; no signal is sent."""
    run = start_run(
        inputs, tmp_path, 110, checkpoint={"interval": 2, "keep": 0},
        faults={"stop_seconds_before_limit": 5},
    )  # fmt: skip
    limit = {"SLURM_JOB_END_TIME": str(int(time.time()) + 15)}
    ended = run.attempt(environment=limit, forker=forker)
    assert ended.status == 85, ended.output[-3000:]
    (stop,) = _events(run, "stop")
    assert stop["reason"] in ("time limit", "another rank was asked to")
    assert 0 < stop["step"] < 110
    assert run.attempt(forker=forker).status == 0
    extra = run.checkpoints / f"step_{stop['step']:08d}"
    if stop["step"] % 2:
        extra.rename(tmp_path / "stopped-here")
    assert differences(run, undisturbed(110)) == []
    table(
        "the job's time limit is near",
        1,
        1,
        "both save once and exit with 85; bit-equal after resuming",
    )
