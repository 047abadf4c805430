from __future__ import annotations

import json
import os
import socket
import threading
import time

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments import store as module
from megatron_hydra.experiments.store import StepStore
from tests.experiments.helpers import step


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HydraError, match="has no experiments"):
        StepStore(tmp_path)
    assert StepStore(tmp_path / "new").root == StepStore(tmp_path / "new").root


def test_records_and_failures(tmp_path):
    store, one = StepStore(tmp_path / "s"), step("one")
    assert not store.is_done(one) and store.record(one) is None
    store.fail(one, "broken")
    failure = store.failure(one)
    assert failure is not None and failure["error"] == "broken"
    store.finish(one, 2.5, 1.25)
    assert store.is_done(one) and store.failure(one) is None
    record = store.record(one)
    assert (
        record is not None
        and record["seconds"] == 2 * record["cpu_seconds"] == 2.5
        and len(record["package_source"]) == 12
    )
    assert store.seconds_by_kind() == {"prepare": 2.5}


def test_seconds_include_the_tries_that_were_stopped(tmp_path):
    store, one = StepStore(tmp_path / "s"), step("one")
    store.folder(one).mkdir(parents=True)
    store.stop(one, 40.0, 30.0)
    store.stop(one, 2.0, 1.0)
    store.finish(one, 0.5, 0.25)
    record = store.record(one)
    assert record is not None
    assert (record["seconds"], record["cpu_seconds"]) == (42.5, 31.25)
    store.finish(one, 1.0)
    record = store.record(one)
    assert record is not None and record["seconds"] == 1.0


def test_steps_are_deleted_unless_a_process_computes_one(tmp_path):
    store, one, two, other = StepStore(tmp_path / "s"), *map(step, ("one", "two", "other"))
    store.discard([one, two])  # nothing exists yet
    store.finish(one, 1.0)
    store.finish(other, 1.0)
    with store.claimed(two):
        here = f"process {os.getpid()} on {socket.gethostname()} is computing this step"
        with pytest.raises(HydraError, match=here):
            store.discard([one, two])
    assert store.is_done(one)
    store.discard([one, two])
    assert [path.name for path in (store.root / "steps").iterdir()] == [store.folder(other).name]


def test_one_claim_at_a_time(tmp_path):
    store, one = StepStore(tmp_path / "s"), step("one")
    order = []

    said: list[str] = []

    def other() -> None:
        with store.claimed(one, said.append) as todo:
            order.append(("other", todo))

    with store.claimed(one) as todo:
        assert todo
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(1.2)
        assert not order
        store.finish(one, 1.0)
    thread.join(timeout=240)
    assert order == [("other", False)]
    here = f"process {os.getpid()} on {socket.gethostname()}"
    assert said == [f"waiting for one: {here} is computing it"]
    assert not (store.folder(one) / "claim.json").exists()


def test_a_failed_owner_leaves_the_step_to_the_next(tmp_path):
    store, one = StepStore(tmp_path / "s"), step("one")
    with pytest.raises(RuntimeError), store.claimed(one):
        raise RuntimeError
    with store.claimed(one) as todo:
        assert todo


@pytest.mark.parametrize("owner", ["dead here", "silent here", "silent elsewhere"])
def test_an_abandoned_claim_is_taken_over(tmp_path, owner, monkeypatch):
    store, one = StepStore(tmp_path / "s"), step("one")
    path = store.folder(one) / "claim.json"
    path.parent.mkdir(parents=True)
    if owner == "dead here":
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        path.write_text(json.dumps({"host": socket.gethostname(), "pid": child}))
    else:
        # "silent here": the id of a process that has ended; another process has it now.
        here = owner == "silent here"
        host, pid = (socket.gethostname(), os.getpid()) if here else ("another-machine", 1)
        path.write_text(json.dumps({"host": host, "pid": pid}))
        old = time.time() - module._STALE_SECONDS - 5
        os.utime(path, (old, old))
    with store.claimed(one) as todo:
        assert todo


def test_a_live_claim_elsewhere_is_respected(tmp_path):
    store, one = StepStore(tmp_path / "s"), step("one")
    path = store.folder(one) / "claim.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"host": "another-machine", "pid": 1}))
    assert module._try_claim(path) is None
    assert path.exists()


def test_a_new_claim_is_not_taken_for_the_abandoned_one_before_it(tmp_path):
    """Another process claimed the step between our reading of the old claim and its removal."""
    path = tmp_path / "claim.json"
    mine = module._try_claim(path)
    module._remove_abandoned_claim(path, json.dumps({"host": "another-machine", "pid": 1}))
    assert path.read_text() == mine and list(tmp_path.iterdir()) == [path]
    module._remove_abandoned_claim(path, mine)
    assert not list(tmp_path.iterdir())


def test_a_claim_that_was_taken_over_stays(tmp_path):
    store, one = StepStore(tmp_path / "s"), step("one")
    path = store.folder(one) / "claim.json"
    with store.claimed(one):
        path.write_text(json.dumps({"host": "another-machine", "pid": 1}))
    assert path.exists()
