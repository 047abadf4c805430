"""Each file of a checkpoint is damaged in turn. A resume and a start find it before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hydra.checkpoint import store
from megatron_hydra.config import apply_overrides
from megatron_hydra.config.run import RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.files import sha256_of_file
from megatron_hydra.training import loop
from megatron_hydra.training.loop import run_training
from tests.faults.runs import start_run

STEPS = 3


def _flip(position: float, bit: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[min(int(position * len(content)), len(content) - 1)] ^= 1 << bit
        path.write_bytes(content)

    return damage


def _cut(keep: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: keep(path.stat().st_size)])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit flipped in the first byte": _flip(0.0, 0),
    "bit flipped at a third": _flip(1 / 3, 3),
    "bit flipped in the middle": _flip(0.5, 6),
    "bit flipped in the last byte": _flip(1.0, 1),
    "last byte cut off": _cut(lambda size: size - 1),
    "cut in half": _cut(lambda size: size // 2),
    "emptied": _cut(lambda size: 0),
    "removed": Path.unlink,
}


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that has finished its steps and could do more."""
    run = start_run(inputs, tmp_path_factory.mktemp("finished"), STEPS, verb="finetune")
    assert run_training(run.config) == 0
    return run.config


def _assert_found(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> str:
    """Assert that the run ends before its first step; returns its error."""

    def no_step(*_: object) -> None:
        raise AssertionError("a step was made")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", no_step)
        with pytest.raises(HydraError) as caught:
            run_training(config)
    return str(caught.value)


def _damage_all(
    folder: Path,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    every_way: bool,
) -> int:
    """Damage one file of ``folder`` at a time, in all ways or in three; returns the number of tries."""
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    names = [p.relative_to(whole) for p in sorted(whole.rglob("*")) if p.is_file()]
    assert {"manifest.json", "model.json", ".metadata", "common.pt"} <= {p.name for p in names}
    ways, tried = list(DAMAGES), 0
    for i, name in enumerate(names):
        for how in ways if every_way else {ways[(3 * i + j) % len(ways)] for j in range(3)}:
            DAMAGES[how](folder / name)
            tried += 1
            message = _assert_found(config, monkeypatch)
            assert folder.name in message, (name, how, message)
            shutil.copyfile(whole / name, folder / name)
    return tried


EVERY_WAY = pytest.mark.parametrize(
    "every_way",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["three ways", "every way"],
)


@EVERY_WAY
def test_damage_to_any_file_of_a_resumed_checkpoint_is_found(
    every_way: bool, finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished.output, output)
    config = apply_overrides(finished, [f"output={output}", f"schedule.steps={STEPS + 1}"])
    tried = _damage_all(
        store.resolve_checkpoint(output / "checkpoints"), config, monkeypatch, tmp_path,
        every_way=every_way,
    )  # fmt: skip
    assert run_training(config) == 0  # the repaired copy is used to resume
    if every_way:
        table(
            "a file of the run's checkpoint truncated, bit-flipped or removed (each in turn)", tried,
            tried, "refused by name before the first step",
        )  # fmt: skip


@EVERY_WAY
def test_damage_to_any_file_of_an_initial_checkpoint_is_found(
    every_way: bool, finished: RunConfig, inputs: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, table,
) -> None:  # fmt: skip
    student = tmp_path / "student"
    shutil.copytree(inputs / "student", student)
    config = apply_overrides(
        finished, [f"student.checkpoint={student}", f"output={tmp_path / 'out'}"]
    )
    tried = _damage_all(student, config, monkeypatch, tmp_path, every_way=every_way)
    assert not (tmp_path / "out/checkpoints").exists()
    if every_way:
        table(
            "a file of the student's checkpoint truncated, bit-flipped or removed (each in turn)",
            tried, tried, "refused by name before the first step",
        )  # fmt: skip


def test_every_byte_of_a_manifest_counts(inputs: Path, tmp_path: Path) -> None:
    """Hashes protect the other files; the digest protects the manifest, its blanks too."""
    folder = tmp_path / "student"
    shutil.copytree(inputs / "student", folder)
    path = folder / store.MANIFEST_FILE
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(HydraError, match="manifest"):
            store.verify_manifest(folder, sizes_only=True)
    path.write_bytes(content)
    store.verify_manifest(folder)


@pytest.mark.parametrize(
    ("content", "resumes"),
    [(b"", False), (b"step_0000", False), (b"step_0000000\x32\n", False), (b"\xff\xfe", False),
     (b"../step_00000003\n", False), (b"step_00000003", True), (None, True)],
)  # fmt: skip
def test_the_pointer_names_a_complete_checkpoint_or_nothing_starts(
    content: bytes | None, resumes: bool, finished: RunConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output = tmp_path / "out"
    shutil.copytree(finished.output, output)
    latest = output / "checkpoints" / store.LATEST_FILE
    latest.unlink()
    if content is not None:
        latest.write_bytes(content)
    config = apply_overrides(finished, [f"output={output}"])
    if resumes:
        assert run_training(config) == 0
        assert sorted((output / "checkpoints").glob("step_*"))[-1].name == "step_00000003"
    else:
        assert "latest" in _assert_found(config, monkeypatch)


@pytest.mark.parametrize("key", ["student", "teacher"])
@pytest.mark.parametrize("path", ["nowhere", "here"])
def test_a_wrong_path_never_means_random_weights(
    key: str, path: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    run = start_run(inputs, tmp_path / "run", STEPS)
    config = apply_overrides(run.config, [f"{key}.checkpoint={tmp_path / path}"])
    message = _assert_found(config, monkeypatch)
    assert str(tmp_path / path) in message


def test_another_checkpoint_than_the_pinned_one_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = sha256_of_file(inputs / "student" / store.MANIFEST_FILE)
    run = start_run(inputs, tmp_path / "run", 1, verb="finetune")
    pinned = apply_overrides(run.config, [f"student.fingerprint=sha256:{manifest}"])
    other = apply_overrides(run.config, [f"student.fingerprint=sha256:{'0' * 64}"])
    assert "it is another checkpoint" in _assert_found(other, monkeypatch)
    assert run_training(pinned) == 0


def test_a_fallback_renames_the_damaged_checkpoint(finished: RunConfig, tmp_path: Path) -> None:
    """Retention counts good checkpoints only. The damaged one stays, so that a person can inspect it."""
    output = tmp_path / "out"
    keep = ["checkpoint.keep=2", "checkpoint.interval=1", f"output={output}"]
    assert run_training(apply_overrides(finished, keep)) == 0
    damaged = output / "checkpoints/step_00000003"
    (damaged / "training.json").unlink()
    resumed = apply_overrides(finished, [*keep, "checkpoint.resume=fallback"])
    assert run_training(resumed) == 0
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["damaged_step_00000003", "latest", "step_00000002", "step_00000003"]
    store.verify_checkpoint(output / "checkpoints/step_00000003")
