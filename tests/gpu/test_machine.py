"""The suite's own scheduler, without a GPU: jobs wait for their requirements, share GPUs, and end."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from tests.gpu.machine import JOBS_PER_GPU, Job, JobFailed, Machine, Place, Scheduler

FOUR = Machine(("0", "1", "2", "3"), is_dry_run=False)


def _scheduler(tmp_path, *jobs, machine=FOUR):
    return Scheduler(machine, jobs, tmp_path)


def test_jobs_run_after_what_they_need(tmp_path):
    order = []

    def body(name):
        return lambda place: order.append(name) or name

    scheduler = _scheduler(
        tmp_path,
        Job("a", body("a")), Job("b", body("b"), gpus=0, after=("a",)),
        Job("c", body("c"), after=("a", "b")), Job("not asked for", body("x")),
    )  # fmt: skip
    assert scheduler.result("c") == "c"
    assert order == ["a", "b", "c"]
    assert set(scheduler.seconds) == {"a", "b", "c"}


def test_a_failure_is_told_to_those_who_wait(tmp_path):
    def fail(place):
        raise ValueError("no such thing")

    scheduler = _scheduler(tmp_path, Job("a", fail), Job("b", print, after=("a",)))
    with pytest.raises(JobFailed, match=r"b did not run: a has failed: [\s\S]*no such thing"):
        scheduler.result("b")
    with pytest.raises(JobFailed, match="no such thing"):
        scheduler.result("a")


def test_gpus_are_shared_evenly_and_never_by_more_than_said(tmp_path):
    lock, load, most = threading.Lock(), dict.fromkeys(FOUR.gpus, 0), []

    def body(place):
        with lock:
            for gpu in place.gpus:
                load[gpu] += 1
            most.append(max(load.values()))
        time.sleep(0.05)
        with lock:
            for gpu in place.gpus:
                load[gpu] -= 1
        return place.gpus

    jobs = [Job(f"{gpus}-{n}", body, gpus) for n in range(8) for gpus in (1, 2, 4)]
    scheduler = _scheduler(tmp_path, *jobs)
    scheduler.want(job.name for job in jobs)
    for job in jobs:
        gpus = scheduler.result(job.name)
        assert len(set(gpus)) == len(gpus) == job.gpus
    assert 1 < max(most) <= JOBS_PER_GPU


def test_a_dry_run_has_one_job_at_a_time(tmp_path):
    running, most = [0], [0]

    def body(place):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.02)
        running[0] -= 1

    jobs = [Job(str(n), body, gpus=n % 2) for n in range(4)]
    scheduler = _scheduler(tmp_path, *jobs, machine=Machine(("0", "1"), is_dry_run=True))
    scheduler.want(job.name for job in jobs)
    for job in jobs:
        scheduler.result(job.name)
    assert most == [1]


def test_the_gpus_of_a_job_are_those_of_its_needs(tmp_path):
    jobs = [Job("a", print, gpus=4), Job("b", print, gpus=0, after=("a",)), Job("c", print)]
    scheduler = _scheduler(tmp_path, *jobs)
    assert [scheduler.gpus_needed(name) for name in "abc"] == [4, 4, 1]


def test_a_process_sees_its_gpus_alone(tmp_path):
    place = Place(FOUR, ("1", "3"), tmp_path)
    ended = place.run("seen", ["-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"])
    assert ended.output.splitlines()[-1] == "1,3"


def test_another_status_fails_with_the_end_of_the_log(tmp_path):
    place = Place(FOUR, (), tmp_path)
    with pytest.raises(JobFailed, match=r"status 3 where 0 is due[\s\S]*so it ends"):
        place.run("ends", ["-c", "import sys; print('so it ends'); sys.exit(3)"])


def test_what_exceeds_its_limit_is_killed_with_its_children(tmp_path):
    child = "import time; time.sleep(600)"
    program = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}], "
        "start_new_session=True); print(p.pid, flush=True); time.sleep(600)"  # as under torchrun
    )
    place = Place(FOUR, (), tmp_path)
    with pytest.raises(JobFailed, match="not through"):
        place.run("hangs", ["-c", program], limit=2)
    pid = int((tmp_path / "hangs.log").read_text().split()[-1])
    psutil = pytest.importorskip("psutil")
    gone = not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert gone


def test_closing_ends_what_runs(tmp_path):
    scheduler = _scheduler(
        tmp_path, Job("sleeps", lambda p: p.run("sleeps", ["-c", "import time; time.sleep(600)"]))
    )
    scheduler.want(["sleeps"])
    while not any(place.families for place in scheduler._running.values()):
        time.sleep(0.01)
    scheduler.close()
    with pytest.raises(JobFailed, match="status -9"):
        scheduler.result("sleeps")
    assert sys.executable in (tmp_path / "sleeps" / "sleeps.log").read_text()
