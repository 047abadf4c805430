"""A disk that is full, read-only or missing: a clear error, and earlier checkpoints are unchanged."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_hydra.checkpoint import store
from megatron_hydra.config import apply_overrides
from megatron_hydra.config.run import RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.training import loop
from megatron_hydra.training.loop import run_training
from megatron_hydra.training.run_folder import step_folders
from megatron_hydra.training.sinks import TensorBoard
from tests.faults.runs import Run, start_run
from tests.required import skip_without

BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    if os.geteuid() != 0:
        skip_without("root", "mounting a small file system wants root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        skip_without("root", f"a small file system cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _config(inputs: Path, tmp_path: Path, output: Path, asynchronous: bool) -> RunConfig:
    run = start_run(
        inputs, tmp_path / "run", 10, verb="finetune",
        checkpoint={"interval": 2, "keep": 0, "asynchronous": asynchronous},
    )  # fmt: skip
    return apply_overrides(run.config, [f"output={output}"])


def _after_first_checkpoint(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Path, action: Callable[[], object]
) -> None:
    """Run ``action`` once, between two steps, when a checkpoint exists; another save may be running."""
    original, done = loop.train_step, [False]

    def patched(*args: object) -> object:
        if not done[0] and step_folders(checkpoints):
            done[0] = True
            action()
        elif not done[0] and checkpoints.exists():
            time.sleep(
                0.5
            )  # a save in the background must end before the last of these short steps
        return original(*args)

    monkeypatch.setattr(loop, "train_step", patched)


def _fill(folder: Path, leave: int = 64 * 1024) -> None:
    """Fill the disk until so many bytes are free."""
    free = shutil.disk_usage(folder).free
    with (folder / "filler").open("wb") as file:
        file.write(b"\0" * max(0, free - leave))


def _assert_intact(checkpoints: Path, *, tidy: bool = True) -> None:
    assert step_folders(checkpoints)
    for path in step_folders(checkpoints):
        store.verify_checkpoint(path)
    assert store.resolve_checkpoint(checkpoints) == step_folders(checkpoints)[-1]
    assert not (tidy and list(checkpoints.glob(".*/weights/*")))  # its space is free again


@BOTH
def test_a_full_disk(
    asynchronous: bool, small_disk: Path, inputs: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, table,
) -> None:  # fmt: skip
    output = small_disk / "out"
    config = _config(inputs, tmp_path, output, asynchronous)
    _after_first_checkpoint(monkeypatch, output / "checkpoints", lambda: _fill(small_disk))
    with pytest.raises(HydraError, match=r"No space left on device.*earlier checkpoints are untou"):
        run_training(config)
    monkeypatch.undo()
    _assert_intact(output / "checkpoints")
    (small_disk / "filler").unlink()
    assert run_training(config) == 0  # with free space, the run continues
    table(
        "disk full while saving" + _kind(asynchronous), 1, 1, "clear error, older checkpoint intact"
    )


@BOTH
def test_a_disk_that_becomes_read_only(
    asynchronous: bool, small_disk: Path, inputs: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, table,
) -> None:  # fmt: skip
    output, checkpoints = tmp_path / "out", tmp_path / "out/checkpoints"
    output.mkdir()
    checkpoints.symlink_to(small_disk, target_is_directory=True)

    def remount(how: str) -> None:
        command = ["mount", "-o", f"remount,{how}", str(small_disk)]
        end = time.monotonic() + 240  # this fails while a file is being written
        while subprocess.run(command, capture_output=True, check=False).returncode:
            assert time.monotonic() < end

    _after_first_checkpoint(monkeypatch, checkpoints, lambda: remount("ro"))
    config = _config(inputs, tmp_path, output, asynchronous)
    with pytest.raises(HydraError, match=r"Read-only file system.*earlier checkpoints are untou"):
        run_training(config)
    monkeypatch.undo()
    remount("rw")
    _assert_intact(checkpoints, tidy=False)
    table(
        "checkpoint folder not writable while saving" + _kind(asynchronous), 1, 1,
        "clear error, older checkpoint intact",
    )  # fmt: skip


@BOTH
def test_a_checkpoint_folder_that_vanishes(
    asynchronous: bool, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table
) -> None:
    output = tmp_path / "out"
    elsewhere = tmp_path / "elsewhere"
    config = _config(inputs, tmp_path, output, asynchronous)
    # As an unmounted disk: its files are undamaged, but not visible.
    _after_first_checkpoint(
        monkeypatch, output / "checkpoints", lambda: (output / "checkpoints").rename(elsewhere)
    )
    with pytest.raises(HydraError, match=r"No such file or directory.*earlier checkpoints are unt"):
        run_training(config)
    monkeypatch.undo()
    assert not (output / "checkpoints").exists()  # not created
    _assert_intact(elsewhere, tidy=False)
    with pytest.raises(HydraError, match=r"holds no checkpoint, but .* was saved there: mount"):
        run_training(config)  # the same command does not start a new run
    table(
        "checkpoint folder vanished while training" + _kind(asynchronous), 1, 1,
        "clear error, older checkpoint intact; the same command is refused while the folder is missing",
    )  # fmt: skip


def test_a_full_disk_with_tensorboard(
    small_disk: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table
) -> None:
    output = small_disk / "out"
    config = apply_overrides(_config(inputs, tmp_path, output, False), ["logging.tensorboard=true"])
    _after_first_checkpoint(monkeypatch, output / "checkpoints", lambda: _fill(small_disk, 0))
    with pytest.raises(HydraError, match="No space left on device"):
        run_training(config)
    monkeypatch.undo()
    _assert_intact(output / "checkpoints")
    table(
        "disk full to the last byte, with TensorBoard", 1, 1, "clear error, older checkpoint intact"
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_says_that_the_disk_is_full(small_disk: Path) -> None:
    """Its writer is a thread that fails by itself, and again when it is closed."""
    sink = TensorBoard(small_disk / "tensorboard", 1)
    _fill(small_disk, 0)

    def write() -> None:
        for step in range(1000):
            sink.write({"step": step, "loss": 1.0})
        sink.close()

    for action in (write, sink.close):
        with pytest.raises(HydraError, match=r"tensorboard cannot be written: .*No space left on"):
            action()


def test_an_output_that_cannot_be_written(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = _config(inputs, tmp_path, tmp_path / "file/out", False)
    with pytest.raises(HydraError, match="Not a directory"):
        run_training(config)


@pytest.mark.slow
def test_a_full_disk_ends_both_ranks(inputs: Path, small_disk: Path, tmp_path: Path) -> None:
    run = Run(
        inputs, tmp_path / "run", "finetune", schedule={"steps": 400, "warmup_steps": 1},
        checkpoint={"interval": 1, "keep": 0},
    )  # fmt: skip
    ended = run.attempt(overrides=(f"output={small_disk / 'out'}",))
    assert ended.status == 2, ended.output[-3000:]
    assert "No space left on device" in ended.output
    assert "Traceback" not in ended.output
    assert ended.left_over == []
    _assert_intact(small_disk / "out/checkpoints")


def _kind(asynchronous: bool) -> str:
    return ", in the background" if asynchronous else ""
