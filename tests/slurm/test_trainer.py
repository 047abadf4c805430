"""The three stages on a real SLURM: stopped, requeued and chained, they end as if undisturbed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_hydra.checkpoint.store import load_canonical
from megatron_hydra.config.loading import to_yaml
from tests.training import tiny

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
STEPS = 120
STAGES = ("align", "distill", "finetune")


def write_stages(folder: Path, inputs: Path) -> list[str]:
    """Configs of three stages that start from each other; returns the launcher's words for them."""
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


def test_stages_survive_a_stop_bit_for_bit(slurm, tmp_path: Path) -> None:
    inputs, whole, stopped = (tmp_path / name for name in ("inputs", "whole", "stopped"))
    tiny.write_all(inputs)
    whole.mkdir()
    stopped.mkdir()
    options = ["--gpus-per-node", "0", "--python", sys.executable, "--logs", str(tmp_path)]
    slurm.run(
        "bash", "launch/local.sh", *options, "--procs-per-node", "2",
        *write_stages(whole, inputs), cwd=ROOT,
    )  # fmt: skip
    submitted = slurm.run(
        "bash", "launch/slurm.sh", *options, "--nodes", "2", "--procs-per-node", "1",
        *write_stages(stopped, inputs), cwd=ROOT,
    )  # fmt: skip
    jobs = [line.split()[1].rstrip(":") for line in submitted.splitlines()]
    assert len(jobs) == 3
    wait_for_steps(stopped / "align", 5)
    slurm.run("scancel", "--signal=USR1", jobs[0])
    for job in jobs:
        ended = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=400)
        log = "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.out")))
        assert ended["JobState"] == "COMPLETED", log
    assert slurm.job(jobs[0])["Restarts"] == "1"
    for stage in STAGES:
        one, other = (tiny.read_metrics(folder / stage) for folder in (whole, stopped))
        assert [line["step"] for line in other] == [line["step"] for line in one]
        assert [line["loss"] for line in other] == [line["loss"] for line in one]
    one, other = (load_canonical(f / "finetune" / "checkpoints") for f in (whole, stopped))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
