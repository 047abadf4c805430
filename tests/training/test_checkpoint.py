"""A run's checkpoints are synced before they are visible, also in the background, and never have bad values."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from megatron_hydra.checkpoint import store
from megatron_hydra.config import apply_overrides
from megatron_hydra.errors import HydraError
from megatron_hydra.files import write_text_atomic
from megatron_hydra.stopping import REQUEUE_EXIT_CODE
from megatron_hydra.training import checkpoint_write, loop
from megatron_hydra.training.loop import run_training
from megatron_hydra.training.run_folder import find_resume_point, retain, step_folders
from tests.checkpoint import legacy
from tests.training import tiny

_STEPS = {"schedule": {"steps": 4, "warmup_steps": 1}}


def _run(inputs: Path, output: Path, *overrides: str, status: int = 0) -> None:
    config = tiny.run_config(inputs, "finetune", "unused", **_STEPS)
    assert run_training(apply_overrides(config, [f"output={output}", *overrides])) == status


def test_files_are_renamed_only_after_they_are_on_disk(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder is synced, then the checkpoint renamed, then the pointer moved."""
    synced: set[tuple[int, int]] = set()
    order: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def identity(path_or_descriptor) -> tuple[int, int]:
        status = os.stat(path_or_descriptor)
        return status.st_dev, status.st_ino

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(identity(descriptor))

    def noted_rename(self: Path, target: Path) -> Path:
        if target.name.startswith("step_"):
            missing = [p for p in (self, *self.rglob("*")) if identity(p) not in synced]
            assert not missing
            synced.discard(identity(target.parent))
            order.append("renamed")
        return rename(self, target)

    def noted_replace(source, target) -> None:
        if Path(target).name == "latest":
            assert identity(source) in synced
            assert identity(Path(target).parent) in synced  # since the rename
            order.append("pointed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(Path, "rename", noted_rename)
    _run(inputs, tmp_path, "checkpoint.interval=2")
    assert order == ["renamed", "pointed"] * 2


def test_a_save_in_the_background_holds_the_weights_of_its_step(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer waits until later steps have changed every tensor that it writes."""
    later = threading.Event()
    write, step, steps = checkpoint_write.CheckpointWrite.write, loop.train_step, [0]

    def held_up(self) -> None:
        assert later.wait(240)
        write(self)

    def counted(*args):
        result = step(*args)
        steps[0] += 1
        if steps[0] == 3:
            assert not list((tmp_path / "background/checkpoints").glob("step_*"))
            later.set()
        return result

    monkeypatch.setattr(checkpoint_write.CheckpointWrite, "write", held_up)
    monkeypatch.setattr(loop, "train_step", counted)
    keep = ["checkpoint.keep=0", "checkpoint.interval=1"]
    interval = ["checkpoint.keep=0", "checkpoint.interval=2"]
    _run(inputs, tmp_path / "background", "checkpoint.asynchronous=true", *interval)
    monkeypatch.undo()
    _run(inputs, tmp_path / "at-once", *keep)
    for name in ("step_00000002", "step_00000004"):
        one, other = (
            tiny.everything(tmp_path / run / "checkpoints" / name)
            for run in ("background", "at-once")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        store.verify_checkpoint(tmp_path / "background/checkpoints" / name)


def _events(output: Path, kind: str) -> list[dict]:
    lines = (output / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_stop_during_a_save_needs_no_second_one(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint_write.CheckpointWrite.write

    def interrupted(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(self)

    monkeypatch.setattr(checkpoint_write.CheckpointWrite, "write", interrupted)
    _run(inputs, tmp_path, "checkpoint.interval=2", status=REQUEUE_EXIT_CODE)
    assert [path.name for path in step_folders(tmp_path / "checkpoints")] == ["step_00000002"]
    (stop,) = _events(tmp_path, "stop")
    assert (stop["step"], stop["saved_step"]) == (2, 2)
    assert len(tiny.read_metrics(tmp_path)) == 2


def test_a_stop_completes_a_running_save_and_starts_no_other(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer waits until the run ends; the lost steps are repeated, bit for bit."""
    leaving = threading.Event()
    write, finish = checkpoint_write.CheckpointWrite.write, checkpoint_write.CheckpointWrite.finish
    step, steps = loop.train_step, [0]

    def held_up(self) -> None:
        assert leaving.wait(60)
        write(self)

    def finished(self) -> dict[str, str]:
        leaving.set()
        return finish(self)

    def signalled(*args):
        steps[0] += 1
        if steps[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(checkpoint_write.CheckpointWrite, "write", held_up)
    monkeypatch.setattr(checkpoint_write.CheckpointWrite, "finish", finished)
    monkeypatch.setattr(loop, "train_step", signalled)
    behind = ["checkpoint.asynchronous=true", "checkpoint.interval=2"]
    _run(inputs, tmp_path / "stopped", *behind, status=REQUEUE_EXIT_CODE)
    monkeypatch.undo()
    checkpoints = tmp_path / "stopped/checkpoints"
    assert [path.name for path in step_folders(checkpoints)] == ["step_00000002"]
    assert len(_events(tmp_path / "stopped", "save begun")) == 1
    (stop,) = _events(tmp_path / "stopped", "stop")
    assert (stop["step"], stop["saved_step"]) == (3, 2)
    _run(inputs, tmp_path / "stopped", *behind)
    _run(inputs, tmp_path / "undisturbed", *behind)
    one, other = (
        tiny.everything(tmp_path / run / "checkpoints") for run in ("stopped", "undisturbed")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_weights_that_are_not_finite_are_not_saved(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for any cause: the loss of the step may be finite."""
    step = loop.train_step

    def poisoned(train_state, *rest):
        result = step(train_state, *rest)
        next(train_state.chunks[0].parameters()).data.view(-1)[0] = float("nan")
        return result

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(HydraError, match="is not finite: the checkpoint is not saved"):
        _run(inputs, tmp_path, "checkpoint.interval=1")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_manifest_has_the_hashes_computed_by_the_writers(inputs: Path, tmp_path: Path) -> None:
    _run(inputs, tmp_path)
    folder = store.resolve_checkpoint(tmp_path / "checkpoints")
    files = store.verify_manifest(folder)["files"]
    assert {"training.json", "weights/.metadata", "weights/__0_0.distcp"} <= files.keys()


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (10, 2, 7, 30):
        (tmp_path / f"step_{step:08d}").mkdir()
    newest = tmp_path / "step_00000007"  # a run that resumed from an earlier step
    retain(tmp_path, newest, 2)
    assert newest in step_folders(tmp_path)
    assert len(step_folders(tmp_path)) == 2
    retain(tmp_path, newest, 0)
    assert len(step_folders(tmp_path)) == 2
    retain(tmp_path, newest, 1)
    assert step_folders(tmp_path) == [newest]


def test_unfinished_checkpoints_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    for name in (".step_00000004.tmp", ".step_00000001.old"):
        (tmp_path / name / "weights").mkdir(parents=True)
    assert find_resume_point(tmp_path, "auto") is None
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_partial_checkpoint(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed between a checkpoint's rename and the move of the pointer saves this checkpoint again."""
    checkpoints = tmp_path / "checkpoints"
    every = ["checkpoint.interval=2", "checkpoint.keep=0"]
    _run(inputs, tmp_path, *every)
    write_text_atomic(checkpoints / "latest", "step_00000002\n")
    remove = shutil.rmtree

    def die_halfway(path, *args, **kwargs) -> None:
        if "step_00000004" in path.name and not path.name.endswith(".tmp"):
            (path / "model.json").unlink()
            raise KeyboardInterrupt
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", die_halfway)
    with pytest.raises(KeyboardInterrupt):
        _run(inputs, tmp_path, *every)
    monkeypatch.undo()
    for folder in step_folders(checkpoints):
        store.verify_checkpoint(folder)
    _run(inputs, tmp_path, *every)
    assert (checkpoints / "latest").read_text() == "step_00000004\n"


def test_missing_checkpoints_do_not_start_a_new_run(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    saved = {"time": 1.0, "event": "save", "step": 4, "checkpoint": "step_00000004"}
    events.write_text(json.dumps(saved | {"event": "start"}) + "\n")
    assert find_resume_point(tmp_path / "checkpoints", "auto") is None
    (tmp_path / "checkpoints").rmdir()
    with events.open("a") as file:
        file.write(json.dumps(saved) + '\n{"time": 2.0, "eve')
    for resume in ("auto", "fallback", "never"):
        with pytest.raises(HydraError, match=r"says that step_00000004 was saved there: mount or"):
            find_resume_point(tmp_path / "checkpoints", resume)
    assert not (tmp_path / "checkpoints").exists()  # not created


def test_a_checkpoint_without_a_manifest_does_not_start_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "step_00000004").mkdir()
    for resume, message in (
        ("auto", "manifest.json is missing"),
        ("fallback", "all 1 checkpoints"),
    ):
        with pytest.raises(HydraError, match=message):
            find_resume_point(tmp_path, resume)


# -- files on the disk ----------------------------------------------------------------------------


def test_checkpoints_of_one_record_a_head_still_load(inputs: Path, tmp_path: Path) -> None:
    """Checkpoints of student, teacher and run, with the optimizer: the run resumes unchanged."""
    old = shutil.copytree(inputs, tmp_path / "inputs")
    records = len(store.read_index(old / "student/weights").storage_data)
    for name in ("student", "teacher"):
        assert legacy.rewrite(old / name) > records
    every = ["checkpoint.interval=2", "checkpoint.keep=0"]
    config = tiny.run_config(old, "distill", str(tmp_path / "old"), **_STEPS)
    assert run_training(apply_overrides(config, every)) == 0
    checkpoints = tmp_path / "old/checkpoints"
    shutil.move(checkpoints / "step_00000004", tmp_path / "undisturbed")
    write_text_atomic(checkpoints / "latest", "step_00000002\n")
    assert legacy.rewrite(checkpoints / "step_00000002") > 4 * records
    assert run_training(apply_overrides(config, every)) == 0
    one, other = tiny.everything(tmp_path / "undisturbed"), tiny.everything(checkpoints)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_process_with_all_heads_writes_one_record_a_tensor(inputs: Path, tmp_path: Path) -> None:
    """A rank writes few records, not one for each head, which made saves slow.

    A gate and its up projection are separate; so are runs of FA and of GDN heads in weights over all heads.
    """
    _run(inputs, tmp_path)
    index = store.read_index(store.resolve_checkpoint(tmp_path / "checkpoints") / store.WEIGHTS)
    counts = {key: len(entry.chunks) for key, entry in index.state_dict_metadata.items()}
    assert len(counts) > 100
    several = {key.rpartition(".")[2] for key, count in counts.items() if count > 1}
    assert several == {"weight", "gamma", "out"}
    assert all(
        key.endswith("mlp.linear_fc1.weight")
        for key, count in counts.items()
        if count > 1 and key.endswith("weight")
    )


def test_the_plan_of_a_save_is_kept_for_the_next(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks exchange their lists of records once, and again after a change."""
    planned = []
    check = checkpoint_write.records.check_cover
    monkeypatch.setattr(
        checkpoint_write.records, "check_cover", lambda boxes: (planned.append(1), check(boxes))[1]
    )
    keep = ["checkpoint.interval=1", "checkpoint.keep=0", "checkpoint.save_optimizer=false"]
    _run(inputs, tmp_path, *keep)
    assert len(step_folders(tmp_path / "checkpoints")) == 4
    assert len(planned) == 2  # the last one has no optimizer
    for folder in step_folders(tmp_path / "checkpoints"):
        store.verify_checkpoint(folder)
