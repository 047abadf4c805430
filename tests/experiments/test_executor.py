"""Scheduling with real worker processes; the steps are trivial functions."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from megatron_hydra.experiments.executor import _Pool, _Schedule, missing_steps, run_plan
from megatron_hydra.experiments.plan import Plan, Step
from megatron_hydra.experiments.store import WITHOUT_WEIGHTS, StepStore
from megatron_hydra.experiments.worker import Outcome
from megatron_hydra.stopping import Stopped
from tests.experiments.helpers import plan_of, step

ROOT = Path(__file__).resolve().parents[2]


def test_inputs_come_first_and_nothing_is_done_twice(tmp_path):
    calls = tmp_path / "calls"
    a = step("a", "count", calls=str(calls))
    b = step("b", inputs={"before": a.key})
    store, lines = StepStore(tmp_path / "s"), []
    assert run_plan(plan_of(a, b), store, 2, lines.append) == []
    assert store.is_done(a) and (store.out(b) / "made").read_text() == "x 0"
    assert lines[0] == "2 steps, 0 of them finished before"
    assert [line.split(": ")[0] for line in lines[1:]] == ["[1/2] a", "[2/2] b"]
    assert all("left" in line for line in lines[1:])
    assert "writing x" in store.log(b).read_text()
    assert run_plan(plan_of(a, b), store, 2, lines.append) == []
    assert lines[-1] == "2 steps, 2 of them finished before"
    assert len(calls.read_text().splitlines()) == 1


def test_failures_are_named_and_others_go_on(tmp_path):
    bad, worse, fatal = step("bad", "refuse"), step("worse", "break_down"), step("fatal", "die")
    after = step("after", inputs={"before": bad.key})
    later = step("later", inputs={"before": after.key})
    good = step("good")
    store, lines = StepStore(tmp_path / "s"), []
    plan = plan_of(bad, worse, fatal, after, later, good)
    failures = {f.step.title: f.message for f in run_plan(plan, store, 1, lines.append)}
    assert set(failures) == {"bad", "worse", "fatal"}
    assert "this cannot work" in failures["bad"]
    assert failures["worse"] == "ZeroDivisionError: by zero"
    assert "Traceback" in store.log(worse).read_text()
    assert "exit status 3" in failures["fatal"]
    assert store.is_done(good)
    assert not store.folder(after).exists() and not store.folder(later).exists()
    assert store.failure(bad) is not None


def test_workers_share_out_the_gpus_and_a_dead_one_gives_its_own_back(tmp_path):
    notes = [str(tmp_path / name) for name in "abcd"]
    pairs = [(notes[0], notes[1]), (notes[1], notes[0]), (notes[2], notes[3]), (notes[3], notes[2])]
    first = [step(f"s{n}", "meet", mine=m, other=o) for n, (m, o) in enumerate(pairs[:2])]
    fatal = step("fatal", "die", inputs={str(n): one.key for n, one in enumerate(first)})
    last = [
        step(f"t{n}", "meet", {"before": first[0].key}, mine=m, other=o)
        for n, (m, o) in enumerate(pairs[2:])
    ]
    plan = plan_of(*first, fatal, *last)
    failures = run_plan(plan, StepStore(tmp_path / "s"), 2, print, gpus=["3", "GPU-7"])
    assert [failure.step.title for failure in failures] == ["fatal"]
    said, modules = zip(*(Path(note).read_text().split() for note in notes), strict=True)
    assert sorted(said[:2]) == sorted(said[2:]) == ["3", "GPU-7"]
    # Exports' code is copied to this folder and imported, so no two workers share it.
    assert len(set(modules[:2])) == 2 and not any(Path(name).exists() for name in modules)


def _holder_and_needy(tmp_path: Path, store: StepStore) -> tuple[Step, Step]:
    """A step that runs until the other one asks it to end, and one that has no memory before that."""
    started, end = str(tmp_path / "started"), str(tmp_path / "end")
    holder = step("holder", "wait_for", started=started, file=end)
    made = str(store.out(holder) / "made")
    return holder, step("needy", "need_room", other=started, end=end, made=made)


def test_a_step_without_gpu_memory_starts_again_beside_fewer(tmp_path):
    store, lines = StepStore(tmp_path / "s"), []
    holder, needy = _holder_and_needy(tmp_path, store)
    assert run_plan(plan_of(holder, needy), store, 2, lines.append, gpus=["3"]) == []
    assert store.is_done(needy) and (tmp_path / "started.calls").read_text() == "call\n" * 2
    assert (
        lines[1]
        == "needy: out of GPU memory beside another step; starts again when fewer run there"
    )
    assert [line.split(": ")[0] for line in lines[2:]] == ["[1/2] holder", "[2/2] needy"]


def test_a_step_without_gpu_memory_fails_if_its_gpu_has_no_other(tmp_path):
    store = StepStore(tmp_path / "s")
    holder, needy = _holder_and_needy(tmp_path, store)
    (failure,) = run_plan(plan_of(holder, needy), store, 2, print, gpus=["3", "4"])
    assert failure.step == needy and failure.message.startswith("out of GPU memory in a step")
    assert store.is_done(holder) and (tmp_path / "started.calls").read_text() == "call\n"


class PlayedPool(_Pool):
    """Workers are played: the pool only counts them, and steps end as :meth:`end` says."""

    def __init__(self, folder: Path, count: int, gpus: list[str]) -> None:
        super().__init__(StepStore(folder), count, 1, gpus)
        self.modules.cleanup()

    def _spawn(self, device):
        self.devices.remove(device)
        process, pipe = mock.Mock(exitcode=1), mock.Mock()
        self.device_of[process] = device
        return process, pipe

    def where(self) -> dict[str, str | None]:
        return {one.title: self.device_of[process] for process, one in self.busy.values()}

    def end(self, *titles: str, outcome: Outcome | None = None) -> list:
        """End these steps; without an outcome, their workers die."""
        pipes = [pipe for pipe, (_, one) in self.busy.items() if one.title in titles]
        for pipe in pipes:
            said = (self.busy[pipe][1].key, outcome)
            pipe.recv.side_effect = [said] if outcome else EOFError
        names = "megatron_hydra.experiments.executor."
        with (
            mock.patch(names + "wait", return_value=pipes),
            mock.patch(names + "Connection", mock.Mock),
        ):
            return self.finished(0.0)


SHORT = Outcome("out of GPU memory", short_of_memory=True)


def begin(schedule: _Schedule, pool: PlayedPool) -> list[str]:
    started = []
    for one in schedule.ready(pool.idle, pool.steps_beside_next):
        pool.start(one, {}, schedule.too_many.get(one.key))
        started.append(one.title)
    return started


def test_the_next_step_goes_to_the_gpu_with_the_fewest(tmp_path):
    pool = PlayedPool(tmp_path / "s", 4, ["3", "4"])
    for title, beside in (("a", 0), ("b", 0), ("c", 1)):
        assert pool.steps_beside_next() == beside
        pool.start(step(title), {})
    assert pool.where() == {"a": "3", "b": "4", "c": "3"}
    (ended,) = pool.end("b", outcome=Outcome())
    assert (ended.key, ended.beside) == (step("b").key, 0) and pool.steps_beside_next() == 0
    pool.start(step("d"), {})
    assert pool.where()["d"] == "4" and len(pool.device_of) == 3  # b's worker is used again
    (died,) = pool.end("a")
    assert died.beside == 1 and "died" in died.outcome.message


def test_others_that_have_just_ended_count_for_the_memory(tmp_path):
    """Also the second of two steps that end at once, and run out of memory, starts again."""
    a, b = step("a"), step("b")
    pool = PlayedPool(tmp_path / "s", 2, ["3"])
    schedule = _Schedule(plan_of(a, b), pool.store, {one.key: one for one in (a, b)})
    assert begin(schedule, pool) == ["a", "b"]
    ends = pool.end("a", "b", outcome=SHORT)
    assert [end.beside for end in ends] == [1, 1]
    assert all("starts again" in schedule.note(end, 2) for end in ends)
    assert begin(schedule, pool) == ["b"]  # alone
    (end,) = pool.end("b", outcome=SHORT)
    assert "FAILED" in schedule.note(end, 2) and begin(schedule, pool) == ["a"]


def test_a_step_that_starts_again_keeps_others_away(tmp_path):
    """Room is kept for it while it waits, and none joins it beyond the number that was one too many."""
    titles = [step(name) for name in "abcdef"]
    pool = PlayedPool(tmp_path / "s", 3, ["3"])
    schedule = _Schedule(plan_of(*titles), pool.store, {one.key: one for one in titles})
    assert begin(schedule, pool) == ["a", "b", "c"]
    pool.store.fail(titles[2], "out of GPU memory")
    schedule.note(pool.end("c", outcome=SHORT)[0], 3)
    assert pool.store.failure(titles[2]) is None
    assert begin(schedule, pool) == []  # d could take the free worker, but c needs less company
    schedule.note(pool.end("a", outcome=Outcome())[0], 3)
    assert begin(schedule, pool) == ["c"]  # beside b, and d would be the second
    schedule.note(pool.end("c", outcome=SHORT)[0], 3)
    assert begin(schedule, pool) == []
    schedule.note(pool.end("b", outcome=Outcome())[0], 3)
    assert begin(schedule, pool) == ["c"] and pool.steps_beside_next() is None
    schedule.note(pool.end("c", outcome=Outcome())[0], 3)
    assert begin(schedule, pool) == ["d", "e", "f"]


def test_no_step_begins_after_the_time_is_over(tmp_path):
    a, b = step("a"), step("b")
    store, lines = StepStore(tmp_path / "s"), []
    assert run_plan(plan_of(a, b), store, 1, lines.append, begin_until=time.monotonic()) == []
    assert not store.is_done(a) and not store.is_done(b)
    later = time.monotonic() + 600
    assert run_plan(plan_of(a, b), store, 1, lines.append, begin_until=later) == []
    assert store.is_done(a) and store.is_done(b)


def test_ctrl_c_lets_the_workers_save(tmp_path):
    started = tmp_path / "started"
    one = step("one", "save_when_stopped", started=str(started))
    store, lines = StepStore(tmp_path / "s"), []

    def press() -> None:
        while not started.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        thread.start()
        with pytest.raises(Stopped):
            run_plan(plan_of(one), store, 1, lines.append)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert lines[1:] == [
        "stopping: the workers save what they have",
        "stopped: the same command resumes from here",
    ]
    assert (store.out(one) / "saved").exists() and not store.is_done(one)
    assert (store.folder(one) / "stopped.json").exists()
    assert not (store.folder(one) / "claim.json").exists()


def test_results_of_other_code_are_told(tmp_path, monkeypatch):
    a, b = step("a"), step("b")
    store, lines = StepStore(tmp_path / "s"), []
    store.finish(a, 1.0)
    monkeypatch.setattr("megatron_hydra.experiments.fingerprint.of_package", lambda: "other")
    store.finish(b, 1.0)
    assert run_plan(plan_of(a, b), store, 1, lines.append) == []
    finished = "2 steps, 2 of them finished before, 1 by other versions of the package's code"
    assert lines == [finished]


def test_weights_are_made_again_only_where_an_unfinished_step_reads_them(tmp_path):
    calls = tmp_path / "calls"
    a = step("a", "count", calls=str(calls))
    b = step("b", inputs={"before": a.key})
    c = step("c", inputs={"before": a.key})
    store = StepStore(tmp_path / "s")
    plan = Plan({one.key: one for one in (a, b, c)}, {"b": b.key})
    run_plan(plan, store, 1, print)
    (store.folder(a) / WITHOUT_WEIGHTS).touch()
    (store.out(a) / "remains").touch()
    assert missing_steps(plan, store) == {}
    plan.cells["c"] = c.key
    assert [one.title for one in missing_steps(plan, store).values()] == ["a", "c"]
    run_plan(plan, store, 1, print)
    assert store.is_whole(a) and not (store.out(a) / "remains").exists()
    assert len(calls.read_text().splitlines()) == 2


_RUN = """
import sys
from pathlib import Path
from megatron_hydra.experiments.executor import run_plan
from megatron_hydra.experiments.store import StepStore
from tests.experiments.helpers import plan_of, step

def main():
    folder = Path(sys.argv[1])
    calls, go = str(folder / "calls"), str(folder / "go")
    first = step("first", "count", calls=calls)
    held = step("held", "wait_for", {"before": first.key}, started=str(folder / "pid"), file=go)
    run_plan(plan_of(first, held), StepStore(folder / "s"), 1, lambda line: print(line, flush=True))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on(tmp_path, number):
    (tmp_path / "run.py").write_text(_RUN)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    deadline = time.time() + 200
    while not (tmp_path / "pid").exists() and time.time() < deadline:
        time.sleep(0.1)
    worker = int((tmp_path / "pid").read_text())
    if number == signal.SIGKILL:
        process.kill()
        os.kill(worker, signal.SIGKILL)  # the whole machine went down
    else:
        process.terminate()
        while process.poll() is None and time.time() < deadline + 400:
            # The step does not check for signals. A second one, 3 s after the first, ends it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3.5)
    assert process.wait(timeout=200) == (85 if number == signal.SIGTERM else -9)
    (tmp_path / "pid").unlink()
    (tmp_path / "go").touch()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "2 steps, 1 of them finished before" in done.stdout
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
