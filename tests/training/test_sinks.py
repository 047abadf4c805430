"""Every sink gets each entry; W&B runs only on request and is never required."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from megatron_hydra.config.run import LoggingConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.reporting import EVENTS_FILE
from megatron_hydra.training.metrics import MetricsLog
from megatron_hydra.training.sinks import JsonLines, TensorBoard, scalars

ENTRY = {
    "step": 2, "loss": 1.5, "layers": [0.5, None, 1.0], "seconds": {"data": 0.1}, "skipped": True,
    "fault": "spike",
}  # fmt: skip


class _Run:
    def __init__(self, **settings) -> None:
        self.settings, self.entries, self.finished = settings, [], False

    def define_metric(self, *names, **settings) -> None:
        self.metric = (names, settings)

    def log(self, entry: dict) -> None:
        self.entries.append(entry)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[_Run]:
    """A stand-in for the wandb package, which is not a dependency; returns the started runs."""
    runs: list[_Run] = []

    def init(**settings) -> _Run:
        runs.append(_Run(**settings))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return runs


def _log(folder: Path, **settings) -> MetricsLog:
    config = LoggingConfig(tensorboard=False, progress=False, **settings)
    return MetricsLog(
        folder, config, first_step=0, total_steps=3, enabled=True, title="distill",
        run_config={"seed": 1},
    )  # fmt: skip


def test_numbers_of_an_entry() -> None:
    assert scalars(ENTRY) == {
        "loss": 1.5, "layers/00": 0.5, "layers/02": 1.0, "seconds/data": 0.1,
    }  # fmt: skip


def test_numbers_of_a_validation() -> None:
    found = {"loss": 2.0, "layers": [1.5, 0.5], "sources": {"web": {"loss": 2.0, "ce": None}}}
    assert scalars({"step": 2, "validation": found}) == {
        "validation/loss": 2.0, "validation/layers/00": 1.5, "validation/layers/01": 0.5,
        "validation/sources/web/loss": 2.0,
    }  # fmt: skip


def test_wandb_gets_the_numbers_and_continues_the_same_run(wandb: list, tmp_path: Path) -> None:
    for _ in range(2):
        log = _log(tmp_path, wandb="offline", wandb_project="p")
        log.write(ENTRY)
        log.close()
    first, second = wandb
    assert first.settings["mode"] == "offline"
    assert (first.settings["project"], first.settings["config"]) == ("p", {"seed": 1})
    assert first.settings["dir"] == str(tmp_path)
    assert first.entries == [scalars(ENTRY) | {"step": 2}]
    assert first.metric == (("*",), {"step_metric": "step"})
    assert first.finished
    assert first.settings["id"] == second.settings["id"]
    assert second.settings["resume"] == "allow"


def test_wandb_that_is_absent_or_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(HydraError, match=r"logging\.wandb is 'online', but wandb is not installed"):
        _log(tmp_path, wandb="online")

    def refuse(**_: object) -> None:
        raise RuntimeError("no API key configured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(HydraError, match=r"does not start: no API key.*logging\.wandb=offline"):
        _log(tmp_path, wandb="online")


def test_wandb_is_not_imported_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = _log(tmp_path)
    log.write(ENTRY)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == ENTRY


@pytest.mark.slow
def test_the_real_wandb_keeps_a_run_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is optional: pip install wandb")
    log = _log(tmp_path, wandb="offline")
    log.write(ENTRY)
    log.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_events_of_all_attempts_are_kept(tmp_path: Path) -> None:
    for step in (0, 4):
        log = _log(tmp_path)
        log.event("start", step, host="here", loss=float("nan"))
        log.close()
    events = [json.loads(line) for line in (tmp_path / EVENTS_FILE).read_text().splitlines()]
    assert [(e["event"], e["step"], e["loss"]) for e in events] == [
        ("start", 0, None), ("start", 4, None),
    ]  # fmt: skip
    assert events[0]["time"] <= events[1]["time"]


def test_half_a_line_of_a_killed_attempt_is_removed(tmp_path: Path) -> None:
    for name in ("first", "second"):
        log = _log(tmp_path)
        log.event(name, 0)
        log.close()
        with (tmp_path / EVENTS_FILE).open("a") as file:
            file.write('{"time": 1.0, "eve')
    lines = (tmp_path / EVENTS_FILE).read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines[:-1]] == ["first", "second"]


class _FullDisk(_Run):
    def finish(self) -> None:
        raise HydraError("no room for the summary")


def test_a_sink_that_fails_to_close_leaves_no_other_open(
    wandb: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["wandb"], "init", _FullDisk)
    log = _log(tmp_path, wandb="offline")
    files = [log._events._file, log._sinks[0]._file]
    with pytest.raises(HydraError, match="no room for the summary"):
        log.close()
    assert all(file.closed for file in files)


def test_errors_while_closing_do_not_hide_the_first_error(
    wandb: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.modules["wandb"], "init", _FullDisk)
    with (
        pytest.raises(HydraError, match="the disk is full"),
        _log(tmp_path, wandb="offline"),
    ):
        raise HydraError("the disk is full")
    assert "no room for the summary" in caplog.text


def test_tensorboard_in_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(HydraError, match=r"tensorboard cannot be written: .*tensorboard=false"):
        TensorBoard(tmp_path / "tensorboard", 1)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(HydraError, match=r"nowhere/x\.jsonl cannot be written"):
        JsonLines(tmp_path / "nowhere/x.jsonl")
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    sink = JsonLines(full)
    with pytest.raises(HydraError, match="No space left on device"):
        sink.write(ENTRY)
