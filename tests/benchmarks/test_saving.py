"""The benchmark of saves: how it reads a run's log, and a toy run."""

from __future__ import annotations

import json

import pytest

from benchmarks import saving


def _write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_blocked_time_is_the_whole_time_of_a_save(tmp_path):
    _write(
        tmp_path / "events.jsonl",
        [
            {"event": "start"},
            {"event": "save begun", "checkpoint": "step_00000006", "seconds": 0.5},
            {"event": "save", "checkpoint": "step_00000006", "seconds": 0.25},
            {"event": "save", "checkpoint": "step_00000012", "seconds": 2.0},
            {"event": "save", "checkpoint": "step_00000017", "seconds": 9.0},
        ],
    )
    assert saving.read_saves(tmp_path) == [
        {"begun": 0.5, "finished": 0.25, "blocked": 0.75},
        {"begun": 0.0, "finished": 2.0, "blocked": 2.0},
    ]


def test_the_step_after_a_save_is_reported_separately(tmp_path):
    _write(
        tmp_path / "metrics.jsonl",
        [
            {"step": step, "seconds": {"forward_backward": float(step**2), "optimizer": 0.5}}
            for step in range(1, 9)
        ],
    )
    # Steps 4 and 7 follow saves; 3, 5, 6 and 8 do not.
    expected = {"after_a_save": (16 + 49) / 2 + 0.5, "other": (25 + 36) / 2 + 0.5}
    assert saving.read_steps(tmp_path, 3) == expected


def test_an_unknown_shape_is_named(capsys):
    assert saving.main(["--shapes", "huge"]) == 2
    assert "'huge' is unknown; known: smollm2_135m" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_at_a_toy_size(tmp_path):
    flags = ["--shapes", "tiny", "--tokens", "32", "--saves", "2", "--interval", "2"]
    flags += ["checkpoint.save_optimizer=false"]  # only those of the last step
    assert saving.main([*flags, "--folder", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out/saving.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == list(saving.MODES)
    for row in rows:
        assert len(row["saves"]) == 2
        assert all(save["blocked"] > 0 for save in row["saves"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
