"""The three stages on a real SLURM: stopped, requeued and chained, they end like undisturbed runs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_hydra.config.loading import to_yaml
from tests.training import tiny

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
STAGES = ("align", "distill", "finetune")


def write_stages(folder: Path, inputs: Path) -> list[str]:
    """Configs of three stages, each of which starts from the last one; returns the launcher's words."""
    words: list[str] = []
    for verb, before in zip(STAGES, (None, *STAGES), strict=False):
        student = folder / before / "checkpoints" if before else inputs / "student"
        config = tiny.run_config(
            inputs, verb, str(folder / verb), student={"checkpoint": str(student)},
            schedule={"steps": STEPS if verb == "align" else 4},
        )  # fmt: skip
        (folder / f"{verb}.yaml").write_text(to_yaml(config))
        words += ["--then", str(folder / f"{verb}.yaml")]
    return words[1:]


def wait_for_steps(run: Path, count: int) -> None:
    end = time.monotonic() + 240
    while not (run / tiny.METRICS_FILE).exists() or len(tiny.read_metrics(run)) < count:
        assert time.monotonic() < end, f"{run} did not get to step {count}"
        time.sleep(0.2)


def launch(slurm, folder: Path, script: str, *words: str) -> list[str]:
    """Run launch/local.sh, or submit with launch/slurm.sh; returns the job ids."""
    options = ["--gpus-per-node", "0", "--python", sys.executable, "--logs", str(folder)]
    output = slurm.run("bash", f"launch/{script}.sh", *options, *words, cwd=ROOT)
    return [line.split()[1].rstrip(":") for line in output.splitlines() if "submitted" in line]


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.out")))


def assert_same_bits(one: Path, other: Path) -> None:
    """Losses of every step, and everything in the last checkpoint: weights, optimizer, generators."""
    mine, theirs = (
        [{k: v for k, v in line.items() if k not in tiny.OF_THE_CLOCK} for line in lines]
        for lines in map(tiny.read_metrics, (one, other))
    )
    assert mine == theirs
    tensors, expected = (tiny.everything(run / "checkpoints") for run in (one, other))
    assert tensors.keys() == expected.keys()
    assert [key for key in tensors if not torch.equal(tensors[key], expected[key])] == []


def test_preempted_stages_end_bit_for_bit_as_undisturbed_ones(slurm, tmp_path: Path, table) -> None:
    """Two nodes; SLURM preempts the first stage for another job, requeues it, and starts the others."""
    inputs, whole, disturbed = (tmp_path / name for name in ("inputs", "whole", "disturbed"))
    tiny.write_all(inputs)
    whole.mkdir()
    disturbed.mkdir()
    launch(slurm, tmp_path, "local", "--procs-per-node", "2", *write_stages(whole, inputs))
    two_nodes = ["--nodes", "2", "--procs-per-node", "1"]
    jobs = launch(slurm, tmp_path, "slurm", *two_nodes, *write_stages(disturbed, inputs))
    assert len(jobs) == 3
    wait_for_steps(disturbed / "align", 5)
    (tmp_path / "urgent.yaml").write_text(json.dumps({"output": str(tmp_path / "u"), "steps": 3}))
    [urgent] = launch(
        slurm, tmp_path, "slurm", "--nodes", "1", "--procs-per-node", "1", "--partition", "urgent",
        "--module", "tests.launch.payload", str(tmp_path / "urgent.yaml"),
    )  # fmt: skip
    for job in (urgent, *jobs):
        ended = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=800)
        assert ended["JobState"] == "COMPLETED", logs(tmp_path)
    assert int(slurm.job(jobs[0])["Restarts"]) >= 1
    events = (disturbed / "align" / "events.jsonl").read_text()
    assert '"stop"' in events
    assert '"resume"' in events
    for stage in STAGES:
        assert_same_bits(disturbed / stage, whole / stage)
    table(
        "SLURM preempts a two-node job for one of higher priority, and requeues it", 1, 1,
        "saved, requeued, resumed; losses, weights, optimizer and generators bit-equal",
    )  # fmt: skip


def test_a_stage_that_fails_stops_the_chain(slurm, tmp_path: Path, table) -> None:
    inputs, chain = tmp_path / "inputs", tmp_path / "chain"
    tiny.write_all(inputs)
    chain.mkdir()
    words = write_stages(chain, inputs)
    words[-2:-2] = ["teacher.checkpoint=nowhere"]  # distill, the second of the three
    words.insert(1, "schedule.steps=4")
    jobs = launch(slurm, tmp_path, "slurm", "--nodes", "2", "--procs-per-node", "1", *words)
    states = [
        slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=400)["JobState"] for job in jobs
    ]
    assert states == ["COMPLETED", "FAILED", "CANCELLED"], logs(tmp_path)
    assert "checkpoint nowhere does not exist" in logs(tmp_path)
    assert not (chain / "finetune").exists()
    table(
        "stages chained 1→2→3, the second fails", 1, 1,
        "first COMPLETED, second FAILED, third CANCELLED and never started",
    )  # fmt: skip


def test_a_job_knows_its_time_limit(slurm, tmp_path: Path) -> None:
    """The time limit that faults.stop_seconds_before_limit uses."""
    (tmp_path / "look.py").write_text(
        "import os, sys\nopen(sys.argv[1], 'w').write(os.environ['SLURM_JOB_END_TIME'])\n"
    )
    [job] = launch(
        slurm, tmp_path, "slurm", "--time", "7", str(tmp_path / "look.py"), str(tmp_path / "end"),
    )  # fmt: skip
    ended = slurm.wait(job, "COMPLETED", "FAILED")
    assert ended["JobState"] == "COMPLETED", logs(tmp_path)
    start = time.mktime(time.strptime(ended["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    assert abs(float((tmp_path / "end").read_text()) - start - 7 * 60) < 60
