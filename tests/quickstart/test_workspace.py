from __future__ import annotations

import json

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.hf.export_files import hf_export_files
from megatron_hydra.quickstart.progress import TrainingProgress
from megatron_hydra.quickstart.student import carries_our_code
from megatron_hydra.quickstart.workspace import STAGES, STUDENTS, Workspace


def test_finished_phases_are_skipped(tmp_path):
    workspace = Workspace(tmp_path / "q")
    workspace.open({"seed": 0}, fresh=False)
    with workspace.phase("select") as todo:
        assert todo
    with pytest.raises(ZeroDivisionError), workspace.phase("convert"):
        raise ZeroDivisionError
    again = Workspace(tmp_path / "q")
    again.open({"seed": 0}, fresh=False)
    with again.phase("select") as todo:
        assert not todo
    assert again.is_done("select") and not again.is_done("convert")
    assert set(again.seconds()) == {"select"}
    again.open({"seed": 1}, fresh=True)
    assert not again.is_done("select")


def test_other_settings_and_other_folders_are_refused(tmp_path):
    Workspace(tmp_path / "q").open({"seed": 0}, fresh=False)
    with pytest.raises(HydraError, match="seed = 0, not 1"):
        Workspace(tmp_path / "q").open({"seed": 1}, fresh=False)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    for fresh in (False, True):
        with pytest.raises(HydraError, match="holds no quickstart"):
            Workspace(tmp_path / "photos").open({"seed": 0}, fresh=fresh)
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_progress_reads_the_metrics(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.open({}, fresh=False)
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


def test_only_our_own_code_is_run(tmp_path):
    assert not carries_our_code(tmp_path)
    for name, source in hf_export_files().items():
        (tmp_path / name).write_bytes(source.read_bytes())
    assert carries_our_code(tmp_path)
    (tmp_path / "extra.py").write_text("")
    assert not carries_our_code(tmp_path)
    (tmp_path / "extra.py").unlink()
    changed = tmp_path / next(iter(hf_export_files()))
    changed.write_text(changed.read_text() + "\n")
    assert not carries_our_code(tmp_path)


def test_students_and_stages_are_the_issues():
    assert STUDENTS == ("hydra", "random", "all_gdn")
    assert STAGES == ("align", "distill", "finetune")
