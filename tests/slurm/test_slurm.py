"""launch/slurm.sh on a real SLURM of two nodes: stop, requeue, preemption, chains, arrays."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

from tests.launch.payload import expected_value

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
COMMON = ["--gpus-per-node", "0", "--procs-per-node", "1", "--python", sys.executable]
PAYLOAD = ["--module", "tests.launch.payload"]


@pytest.fixture
def submit(slurm, tmp_path: Path):
    """Submits steps from the repository's root and returns the ids of their jobs."""

    def run(*arguments: str) -> list[str]:
        command = ["bash", "launch/slurm.sh", "--logs", str(tmp_path / "logs"), *COMMON, *arguments]
        return re.findall(r"submitted (\d+)", slurm.run(*command, cwd=ROOT))

    return run


def config(folder: Path, name: str = "align", **values: object) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"output": str(folder / name), **values}))
    return str(path)


def final(folder: Path, name: str = "align") -> dict:
    return json.loads((folder / name / "final.json").read_text())


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / "logs").glob("*.out")))


def wait_for(path: Path, folder: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, logs(folder)
        time.sleep(0.1)


def test_two_nodes_stopped_by_a_signal_are_requeued_and_end_the_same(
    slurm, submit, tmp_path: Path
) -> None:
    [whole] = submit("--nodes", "2", *PAYLOAD, config(tmp_path, "whole", steps=100))
    assert slurm.wait(whole, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", logs(tmp_path)
    [job] = submit("--nodes", "2", *PAYLOAD, config(tmp_path, steps=100))
    wait_for(tmp_path / "align" / "started.json", tmp_path)
    slurm.run("scancel", "--signal=USR1", job)
    ended = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), logs(tmp_path)
    assert json.loads((tmp_path / "align" / "started.json").read_text())["world"] == 2
    assert final(tmp_path) == {"step": 100, "value": expected_value(100, 2), "starts": 2}
    assert final(tmp_path)["value"] == final(tmp_path, "whole")["value"]


def test_a_preempted_job_saves_and_ends_the_same(slurm, submit, tmp_path: Path) -> None:
    [job] = submit("--nodes", "2", *PAYLOAD, config(tmp_path, steps=200))
    wait_for(tmp_path / "align" / "started.json", tmp_path)
    [urgent] = submit("--partition", "urgent", *PAYLOAD, config(tmp_path, "urgent", steps=3))
    assert slurm.wait(urgent, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", logs(tmp_path)
    ended = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert ended["JobState"] == "COMPLETED", logs(tmp_path)
    assert int(ended["Restarts"]) >= 1
    assert final(tmp_path) == {"step": 200, "value": expected_value(200, 2), "starts": 2}


def test_the_time_limit_is_announced_in_time_to_save(slurm, submit, tmp_path: Path) -> None:
    # SLURM checks every half minute and signals up to a minute early: here after 60 to 120 of 180 seconds. The
    # run takes longer.
    [job] = submit(
        "--time", "3", "--signal-before", "60", *PAYLOAD,
        config(tmp_path, steps=1300, seconds=0.1),
    )  # fmt: skip
    ended = slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT", seconds=800)
    assert ended["JobState"] == "COMPLETED", logs(tmp_path)
    assert int(ended["Restarts"]) >= 1
    assert final(tmp_path)["value"] == expected_value(1300, 1)


def test_a_cancelled_job_saves_and_is_not_requeued(slurm, submit, tmp_path: Path) -> None:
    [job] = submit("--nodes", "2", *PAYLOAD, config(tmp_path, steps=2000))
    wait_for(tmp_path / "align" / "started.json", tmp_path)
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED")
    wait_for(tmp_path / "align" / "state.json", tmp_path)
    time.sleep(15)  # longer than the wait of a requeued job
    ended = slurm.job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), logs(tmp_path)


def test_a_chain_runs_in_order(slurm, submit, tmp_path: Path) -> None:
    steps = [
        config(tmp_path, "align", steps=40),
        config(tmp_path, "distill", steps=3, after=str(tmp_path / "align")),
        config(tmp_path, "finetune", steps=3, after=str(tmp_path / "distill")),
    ]
    jobs = submit(*PAYLOAD, steps[0], "--then", steps[1], "--then", steps[2])
    assert len(jobs) == 3
    # A requeue of the first job does not release the second one.
    wait_for(tmp_path / "align" / "started.json", tmp_path)
    slurm.run("scancel", "--signal=TERM", jobs[0])
    for job in jobs:
        assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")["JobState"] == "COMPLETED", logs(
            tmp_path
        )
    assert slurm.job(jobs[0])["Restarts"] == "1"
    assert final(tmp_path, "finetune")["step"] == 3


def test_a_step_that_fails_ends_the_chain(slurm, submit, tmp_path: Path) -> None:
    jobs = submit(
        "--nodes", "2", *PAYLOAD, config(tmp_path, "align", steps=50, fail_at=2),
        "--then", config(tmp_path, "distill"), "--then", config(tmp_path, "finetune"),
    )  # fmt: skip
    ended = slurm.wait(jobs[0], "COMPLETED", "FAILED", "CANCELLED")
    # The other node's rank waits in a collective; it also ends soon after.
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    for job in jobs[1:]:
        assert slurm.wait(job, "CANCELLED", "COMPLETED", seconds=60)["JobState"] == "CANCELLED"
    assert not (tmp_path / "distill").exists()


def test_an_array_runs_one_experiment_a_line(slurm, submit, tmp_path: Path) -> None:
    lines = [f"output={tmp_path / name} steps={n}" for name, n in (("a", 2), ("b", 3), ("c", 4))]
    (tmp_path / "array.txt").write_text("\n".join(["# three", *lines]))
    [job] = submit("--array", str(tmp_path / "array.txt"), *PAYLOAD, config(tmp_path, "base"))
    for task in range(3):
        assert slurm.wait(f"{job}_{task}", "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert [final(tmp_path, name)["step"] for name in "abc"] == [2, 3, 4]


def test_a_job_gives_up_after_its_last_requeue(slurm, submit, tmp_path: Path) -> None:
    [job] = submit("--max-requeues", "1", *PAYLOAD, config(tmp_path, steps=2000))
    for start in (1, 2):
        wait_for(tmp_path / "align" / "started.json", tmp_path)
        (tmp_path / "align" / "started.json").unlink()
        slurm.run("scancel", "--signal=USR1", job)
        if start == 1:
            assert slurm.wait(job, "PENDING", "FAILED")["JobState"] == "PENDING", logs(tmp_path)
    assert slurm.wait(job, "FAILED", "COMPLETED", "CANCELLED")["JobState"] == "FAILED"
    assert "requeued 1 times: giving up" in logs(tmp_path)
