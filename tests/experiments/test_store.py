from __future__ import annotations

import json
import os
import threading
import time

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments import store as module
from megatron_hydra.experiments.store import StepStore
from tests.experiments.helpers import step


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HydraError, match="holds no experiments"):
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


def test_one_claim_at_a_time(tmp_path):
    store, one = StepStore(tmp_path / "s"), step("one")
    order = []

    def other() -> None:
        with store.claimed(one) as todo:
            order.append(("other", todo))

    with store.claimed(one) as todo:
        assert todo
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(1.2)
        assert not order
        store.finish(one, 1.0)
    thread.join(timeout=10)
    assert order == [("other", False)]
    assert not (store.folder(one) / "claim.json").exists()


def test_a_failed_owner_leaves_the_step_to_the_next(tmp_path):
    store, one = StepStore(tmp_path / "s"), step("one")
    with pytest.raises(RuntimeError), store.claimed(one):
        raise RuntimeError
    with store.claimed(one) as todo:
        assert todo


@pytest.mark.parametrize("owner", ["dead here", "silent elsewhere"])
def test_an_abandoned_claim_is_taken_over(tmp_path, owner, monkeypatch):
    store, one = StepStore(tmp_path / "s"), step("one")
    path = store.folder(one) / "claim.json"
    path.parent.mkdir(parents=True)
    if owner == "dead here":
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        path.write_text(json.dumps({"host": module.socket.gethostname(), "pid": child}))
    else:
        path.write_text(json.dumps({"host": "another-machine", "pid": 1}))
        old = time.time() - module._STALE_SECONDS - 5
        os.utime(path, (old, old))
    with store.claimed(one) as todo:
        assert todo


def test_a_live_claim_elsewhere_is_respected(tmp_path):
    store, one = StepStore(tmp_path / "s"), step("one")
    path = store.folder(one) / "claim.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"host": "another-machine", "pid": 1}))
    assert not module._try_claim(path)
    assert path.exists()
