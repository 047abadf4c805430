"""Blend, batch and replicas change between the attempts of one run; the optimizer state continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hydra.checkpoint import store
from megatron_hydra.config import apply_overrides
from megatron_hydra.errors import HydraError
from megatron_hydra.reporting.run_page import write_run_page
from megatron_hydra.training import loop
from megatron_hydra.training.checkpoint import TRAINING_FILE
from megatron_hydra.training.loop import run_training
from tests.training import tiny


@pytest.fixture(scope="module")
def blends(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Overrides for three blends: the tiny text, this text and other data, only the other data."""
    other = tiny.write_text(tmp_path_factory.mktemp("other"), documents=41, longest=30)
    first, second = f"{{path: {inputs / 'text'}, weight: 2}}", f"{{path: {other}}}"
    return {
        "A": f"data.blend=[{first}]",
        "AB": f"data.blend=[{first}, {second}]",
        "B": f"data.blend=[{second}]",
    }


def _run(inputs: Path, output: Path, *overrides: str, **sections: Any) -> None:
    config = tiny.run_config(
        inputs, "finetune", "unused",
        data={"packing": "split_long"}, checkpoint={"interval": 100, "keep": 0}, **sections,
    )  # fmt: skip
    assert run_training(apply_overrides(config, [f"output={output}", *overrides])) == 0


def _events(output: Path, name: str) -> list[dict[str, Any]]:
    lines = (output / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def _data(output: Path) -> dict[str, Any]:
    folder = store.resolve_checkpoint(output / "checkpoints")
    return json.loads((folder / TRAINING_FILE).read_text())["data"]


def test_a_chain_of_blends_and_batches_is_counted_logged_and_recorded(
    inputs: Path, blends: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Train on A, then on B in larger batches, then on A in the first batches."""
    caplog.set_level("INFO")
    output = tmp_path / "run"
    batch = "batch.global_batch_size=6"
    _run(inputs, output, blends["A"], "schedule.steps=2")
    with pytest.raises(
        HydraError, match=r"to allow the change, set data\.phase=2: it applies from step 3 on"
    ):
        _run(inputs, output, blends["B"], batch, "schedule.steps=4")
    _run(inputs, output, blends["B"], batch, "schedule.steps=4", "data.phase=2")
    _run(inputs, output, blends["A"], "schedule.steps=5", "data.phase=3")

    data = _data(output)
    assert [span["global_batch_size"] for span in data["spans"]] == [4, 6, 4]
    parts = [
        (part["source"], part["first"], part["samples"])
        for span in data["spans"]
        for part in span["parts"]
    ]
    assert parts == [(0, 0, 8), (1, 0, 12), (0, 8, 4)]
    assert [source["samples"] for source in data["sources"]] == [12, 12]
    assert all(source["tokens"] > 0 for source in data["sources"])
    metrics = tiny.read_metrics(output)
    assert [entry["tokens"] // tiny.SEQUENCE for entry in metrics] == [4, 8, 14, 20, 24]
    assert metrics[-1]["tokens"] == data["samples"] * tiny.SEQUENCE
    # The checkpoint's manifest, which the next stage copies, has the same record.
    folder = store.resolve_checkpoint(output / "checkpoints")
    provenance = store.read_manifest(folder)["provenance"]
    assert provenance["data"] == {key: data[key] for key in ("sources", "spans")}
    # So have the events, the log and the page.
    second, third = _events(output, "reading changed")
    assert (second["step"], second["phase"], second["global_batch_size"]) == (2, [1, 2], [4, 6])
    assert [source["weight"] for source in second["sources"]] == [[2.0, None], [None, 1.0]]
    assert [source["samples"] for source in third["sources"]] == [8, 12]
    changed = _events(output, "resume")[0]["changed"]
    assert {"data.blend", "batch.global_batch_size", "data.phase"} <= changed.keys()
    assert "text: no longer in the blend; 8 sequences read" in caplog.text
    assert "batch.global_batch_size was 4 and is 6 now: new phase" in caplog.text
    write_run_page(output, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Data read" in page
    assert "<td>3 to 4</td><td>2</td><td>6</td>" in page


def test_a_phase_without_a_change_is_the_run_without_it(
    inputs: Path, blends: dict[str, str], tmp_path: Path
) -> None:
    """Weights, optimizer and generators are equal bit for bit: the start of a phase changes nothing else."""
    for name, phase in (("plain", 1), ("phase", 2)):
        _run(inputs, tmp_path / name, blends["AB"], "schedule.steps=2")
        _run(inputs, tmp_path / name, blends["AB"], "schedule.steps=4", f"data.phase={phase}")
    plain, phase = (tiny.everything(tmp_path / name / "checkpoints") for name in ("plain", "phase"))
    assert plain.keys() == phase.keys()
    assert any("exp_avg" in name for name in plain)
    for name, tensor in plain.items():
        assert torch.equal(tensor, phase[name]), name
    assert [span["phase"] for span in _data(tmp_path / "phase")["spans"]] == [1, 2]


@pytest.mark.slow
def test_a_run_that_dies_before_the_first_save_of_a_phase_begins_it_again(
    inputs: Path, blends: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command resumes; the result is that of a run that was not killed."""
    ends = {}
    for name in ("whole", "killed"):
        output = tmp_path / name
        _run(inputs, output, blends["A"], "schedule.steps=2")
        rest = (blends["AB"], "schedule.steps=4", "data.phase=2", "batch.global_batch_size=2")
        if name == "killed":
            with monkeypatch.context() as patch:
                patch.setattr(loop._Run, "_save", _die)
                with pytest.raises(KeyboardInterrupt):
                    _run(inputs, output, *rest)
        _run(inputs, output, *rest)
        ends[name] = tiny.everything(output / "checkpoints")
    assert all(torch.equal(ends["whole"][name], ends["killed"][name]) for name in ends["whole"])
    assert _data(tmp_path / "whole") == _data(tmp_path / "killed")


def _die(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_the_learning_rate_follows_the_sequences_read(
    inputs: Path, blends: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With twice the batch for the rest of the data, the run has every second rate of the unchanged run."""
    caplog.set_level("INFO")
    steady, changed = tmp_path / "steady", tmp_path / "changed"
    _run(inputs, steady, blends["A"], "schedule.steps=8")
    with pytest.MonkeyPatch.context() as patch:  # a stop before the same end
        _stop_after(2, patch)
        config = tiny.run_config(inputs, "finetune", "x", data={"packing": "split_long"})
        overrides = [f"output={changed}", blends["A"], "schedule.steps=8"]
        assert run_training(apply_overrides(config, overrides)) == 85
    double = "batch.global_batch_size=8"
    _run(inputs, changed, blends["A"], "schedule.steps=5", "data.phase=2", double)
    rates = {entry["tokens"]: entry["lr"] for entry in tiny.read_metrics(steady)}
    others = {entry["tokens"]: entry["lr"] for entry in tiny.read_metrics(changed)}
    assert len(others) == 5
    assert others == pytest.approx({tokens: rates[tokens] for tokens in others}, rel=1e-9)
    assert "schedule.steps=5 now reads 32, before 20; schedule.steps=4 reads" in caplog.text


def _stop_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """Request a stop while a run makes a step."""
    made, original = [], loop.train_step

    def counted(train_state, batches, notices, timers):
        made.append(1)
        return original(train_state, batches, lambda: (len(made) >= step, notices()[1]), timers)

    patch.setattr(loop, "train_step", counted)


def test_another_blend_restarts_the_held_out_losses(
    inputs: Path, blends: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The held-out losses are of other documents, so patience starts again."""
    caplog.set_level("INFO")
    output = tmp_path / "run"
    common = (
        "data.held_out=0.25", "validation.interval=1", "validation.sequences=4",
        "schedule.patience=1", "schedule.min_improvement=100", "schedule.steps=9",
    )  # fmt: skip
    _run(inputs, output, blends["A"], *common)
    assert _data(output)["step"] == 2  # the second validation does not improve by 100
    with pytest.raises(HydraError, match=r"data\.phase=2"):
        _run(inputs, output, blends["AB"], *common)
    _run(inputs, output, blends["AB"], *common, "data.phase=2")
    assert _data(output)["step"] == 4
    assert "best held-out loss and patience start again" in caplog.text
    held = [entry["validation"]["sources"].keys() for entry in tiny.read_metrics(output)]
    assert [len(sources) for sources in held] == [1, 1, 2, 2]


def test_data_that_was_trained_on_cannot_be_held_out_later(
    inputs: Path, blends: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    _run(inputs, output, blends["A"], "schedule.steps=2")
    read = f"validation.blend=[{{path: {inputs / 'text'}}}]"
    with pytest.raises(
        HydraError, match=r"validation\.blend\.0 .*text.* trained on 8 of its sequences"
    ):
        _run(inputs, output, blends["B"], "data.phase=2", read, "validation.interval=1",
             "validation.sequences=2", "schedule.steps=3")  # fmt: skip
