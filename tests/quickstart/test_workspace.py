from __future__ import annotations

import json
import subprocess

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.quickstart.progress import TrainingProgress
from megatron_hydra.quickstart.workspace import STAGES, Workspace
from megatron_hydra.stopping import Stopped


def test_finished_phases_are_skipped(tmp_path):
    workspace = Workspace(tmp_path / "q")
    with workspace.opened({"seed": 0}, fresh=False):
        with workspace.phase("select") as todo:
            assert todo
        with pytest.raises(ZeroDivisionError), workspace.phase("convert"):
            raise ZeroDivisionError
    again = Workspace(tmp_path / "q")
    with again.opened({"seed": 0}, fresh=False):
        with again.phase("select") as todo:
            assert not todo
        assert again.is_done("select") and not again.is_done("convert")
        assert set(again.seconds()) == {"select"}
    with again.opened({"seed": 1}, fresh=True):
        assert not again.is_done("select")


def test_seconds_include_the_tries_that_were_stopped(tmp_path, monkeypatch):
    clock = iter([0.0, 40.0, 100.0, 102.5])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    workspace = Workspace(tmp_path)
    with pytest.raises(Stopped), workspace.phase("train"):
        raise Stopped
    with workspace.phase("train") as todo:
        assert todo
    assert workspace.seconds() == {"train": 42.5}


def test_a_run_with_other_settings_is_refused(tmp_path):
    with Workspace(tmp_path / "q").opened({"seed": 0}, fresh=False):
        pass
    refused = pytest.raises(HydraError, match="seed = 0, not 1")
    with refused, Workspace(tmp_path / "q").opened({"seed": 1}, fresh=False):
        pass


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["a.jpg", "settings.json"])
def test_the_folders_of_others_are_left_alone(tmp_path, name, fresh):
    (tmp_path / name).write_text("{}")
    refused = pytest.raises(HydraError, match="holds no quickstart")
    with refused, Workspace(tmp_path).opened({"seed": 0}, fresh=fresh):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_fresh_leaves_what_the_quickstart_did_not_write(tmp_path):
    workspace = Workspace(tmp_path)
    with workspace.opened({"seed": 0}, fresh=False):
        (tmp_path / "retrieval.png").write_text("old")
        (tmp_path / "notes.txt").write_text("mine")
    with workspace.opened({"seed": 1}, fresh=True):
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert not (tmp_path / "retrieval.png").exists()


def test_one_quickstart_at_a_time_works_in_a_folder(tmp_path):
    """Also after the death of the one that started it: its students inherit the lock."""
    workspace = Workspace(tmp_path)
    with workspace.opened({}, fresh=False):
        student = subprocess.Popen(["sleep", "60"], pass_fds=(workspace.lock,))
    refused = pytest.raises(HydraError, match="another quickstart is at work")
    try:
        with refused, Workspace(tmp_path).opened({}, fresh=False):
            pass
    finally:
        student.kill()
        student.wait()
    with Workspace(tmp_path).opened({}, fresh=False):
        pass


def test_progress_reads_the_metrics(tmp_path):
    workspace = Workspace(tmp_path)
    lines: list[str] = []
    progress = TrainingProgress(workspace, dict.fromkeys(STAGES, 10), lines.append)
    progress.terminal = False
    folder = workspace.run("hydra", "align")
    folder.mkdir(parents=True)
    entries = [json.dumps({"step": n, "loss": 1.5}) for n in range(1, 6)]
    (folder / "metrics.jsonl").write_text("\n".join(entries) + '\n{"step": 6, "lo')
    with workspace.phase("random_evaluate"):
        pass
    progress.last_shown = -1e9
    progress.show()
    progress.show()  # too soon for another line
    assert len(lines) == 1
    assert "hydra align 5/10 loss 1.50" in lines[0]
    assert "random done" in lines[0] and "all_gdn starting" in lines[0] and "left" in lines[0]
