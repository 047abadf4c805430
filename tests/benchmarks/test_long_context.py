"""The benchmark of long documents: it keeps limits, refuses results that differ, and runs at a toy size."""

from __future__ import annotations

import json
import sys
import time

import pytest

from benchmarks import long_context
from megatron_hydra.config.validate import check_layout


def _row(**changes):
    row = {
        "layout": "a",
        "model": "hydra",
        "tokens": 64,
        "ended": "done",
        "steps": 2,
        "losses": [5.0, 4.0],
        "grad_norms": [1.0, 0.9],
    }
    return row | changes


def test_layouts_that_agree_are_no_problem():
    assert long_context.disagreements([_row(), _row(layout="b", losses=[5.001, 4.001])]) == []
    other_length = _row(layout="b", tokens=128, losses=[7.0, 6.0])
    assert long_context.disagreements([_row(), other_length]) == []
    assert long_context.disagreements([_row(), _row(model="dense", losses=[7.0, 6.0])]) == []


def test_the_speed_up_needs_both_models_in_one_layout():
    rows = [
        _row(step_seconds=2.0),
        _row(model="dense", step_seconds=9.0),
        _row(layout="b", step_seconds=2.0),
        _row(layout="c", step_seconds=2.0),
        _row(layout="c", model="dense", step_seconds=float("nan")),
    ]
    assert long_context.speed_ups(rows) == {"a": 4.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [5.0, 4.1]}, "step 2, losses: 4.1 with b, 4.0 with a"),
        ({"grad_norms": [1.2, 0.9]}, "step 1, grad_norms"),
        ({"losses": [5.0, None]}, "not finite"),
        ({"losses": [5.0, float("nan")]}, "not finite"),
        ({"ended": "limit of 5 s", "steps": 1}, "b: limit of 5 s after 1 steps"),
    ],
)
def test_problems_of_a_comparison(changes, message):
    found = long_context.disagreements([_row(), _row(layout="b", **changes)])
    assert any(message in problem for problem in found)


_WRITER = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[1]); out.mkdir()
with open(out / "metrics.jsonl", "w") as file:
    for step in range(1, 1 + int(sys.argv[2])):
        file.write(json.dumps({"step": step}) + "\\n"); file.flush()
    file.write('{"step": 9'); file.flush()
    time.sleep(float(sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("steps", "sleep", "limit", "ended", "seen"),
    [(5, 600, 60, "done", 3), (2, 600, 1.5, "limit of 2 s", 2), (1, 0, 60, "status 0", 1)],
)
def test_a_run_ends_when_it_is_time(tmp_path, steps, sleep, limit, ended, seen):
    words = [sys.executable, "-c", _WRITER, str(tmp_path / "run"), str(steps), str(sleep)]
    begin = time.monotonic()
    row = long_context.run_layout(words, tmp_path / "run", 3, limit)
    assert (row["ended"], len(row["metrics"]), len(row["arrived"])) == (ended, seen, seen)
    assert time.monotonic() - begin < 60


def test_summary_of_a_run_that_made_no_step():
    row = {"layout": "a", "model": "hydra", "tokens": 64, "ended": "limit of 5 s", "metrics": [],
           "arrived": [], "planned": {"gib": 1.0}}  # fmt: skip
    row |= long_context.summary(row)
    assert row["steps"] == 0
    shown = long_context.table([row])
    assert "| 0 (limit of 5 s) | – | – | – | – (1.0) GiB |" in shown


@pytest.mark.parametrize("name", long_context.LAYOUTS)
def test_layouts_can_hold_the_model(name, tmp_path):
    from benchmarks import _models as models
    from megatron_hydra.config.loading import load_run_config

    layout = long_context.LAYOUTS[name]
    args = long_context._parser().parse_args(["--output", str(tmp_path)])
    output = tmp_path / "run"
    overrides = long_context._overrides(layout, layout.tokens, tmp_path, "hydra", output, args)
    configs = [long_context.CONFIGS / name for name in ("finetune.yaml", "finetune_512k.yaml")]
    config = load_run_config(configs, overrides)
    assert config.data.sequence_length == layout.tokens
    check_layout(config, layout.gpus, models.hybrid(models.QWEN3_1_7B, 2))


def test_bad_flags_are_named(tmp_path, capsys):
    flags = ["--output", str(tmp_path), "--tiny"]
    assert long_context.main([*flags, "--layouts", "context 3"]) == 2
    assert "--layouts: 'context 3' is unknown" in capsys.readouterr().err
    assert long_context.main([*flags, "--steps", "1"]) == 2
    assert "--steps" in capsys.readouterr().err
    assert long_context.main([*flags, "--models", "hydra,sparse"]) == 2
    assert "--models: 'sparse' is unknown; known: hydra, dense" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_toy_runs_from_end_to_end(tmp_path):
    flags = ["--output", str(tmp_path), "--tiny", "--steps", "2"]
    assert long_context.main([*flags, "--models", "hydra,dense"]) == 0
    report = json.loads((tmp_path / "long_context.json").read_text())
    rows = [(row["layout"], row["model"]) for row in report["rows"]]
    layouts = ("context 2", "tensor 2")
    assert rows == [(layout, model) for layout in layouts for model in ("hydra", "dense")]
    assert all(row["steps"] == 2 for row in report["rows"])
    assert set(report["speed_ups"]) == set(layouts)
    assert "| dense | tensor 2 | 512 | 2 |" in (tmp_path / "table.md").read_text()
