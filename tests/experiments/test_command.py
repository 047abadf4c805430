"""The command: errors, a dry run, SLURM's array; the slow tests run the whole chain on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.command import Request, draw, gpus_of_workers, run, show
from megatron_hydra.experiments.plan import make_plan
from megatron_hydra.experiments.slurm import as_word
from megatron_hydra.experiments.spec import load_experiment
from megatron_hydra.experiments.store import StepStore
from tests.experiments.conftest import BODY

ROOT = Path(__file__).resolve().parents[2]
ROWS = "variants: {dense: {hf_model: teacher}, hydra: {}, gated: {hydra: {fusion: gated}}}"


def test_dry_run_lists_steps_and_computes_nothing(write, tmp_path):
    lines: list[str] = []
    request = Request([write(ROWS)], tmp_path / "s", dry_run=True)
    assert run(request, lines.append) == 0
    assert lines[-1] == "27 steps for 6 cells; without sharing: 34"
    assert sum(line.startswith("to do") for line in lines) == 27
    assert any("teacher-" in line and "(and 3 more cells)" in line for line in lines)
    assert not (tmp_path / "s" / "steps").exists()


def test_unknown_rows_and_cells_are_refused(write, tmp_path):
    path = write(ROWS)
    with pytest.raises(HydraError, match="--only x: no such row; there are dense, gated, hydra"):
        run(Request([path], tmp_path / "s", only=["x"]), print)
    with pytest.raises(HydraError, match="no cell 'trial / gone / seed 0' any more"):
        run(Request([path], tmp_path / "s", cell=as_word("trial / gone / seed 0")), print)


def test_gpus_are_numbers_among_those_that_are_visible(write, monkeypatch):
    plan = make_plan(load_experiment(write(ROWS)).cells)
    monkeypatch.setattr("megatron_hydra.parallel.platform.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus_of_workers(plan, None) == ["0", "1"] and gpus_of_workers(plan, [1]) == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,5")
    assert gpus_of_workers(plan, None) == ["GPU-a", "5"] and gpus_of_workers(plan, [1]) == ["5"]
    with pytest.raises(HydraError, match="--gpus 2: this process sees 2 GPUs"):
        gpus_of_workers(plan, [0, 2])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("megatron_hydra.parallel.platform.device_count", lambda: 1)
    assert gpus_of_workers(plan, None) == ["0"] and gpus_of_workers(plan, [0]) == ["0"]
    many = "variants: {a: {stages: {align: {processes: 4, set: {batch.micro_batch_size: 4}}}}}"
    plan = make_plan(load_experiment(write(many)).cells)
    assert gpus_of_workers(plan, None) == []  # each of its ranks takes one
    with pytest.raises(HydraError, match="a stage has 4 processes"):
        gpus_of_workers(plan, [0])
    plan = make_plan(load_experiment(write("variants: {a: {evaluation: {processes: 4}}}")).cells)
    assert gpus_of_workers(plan, None) == []
    with pytest.raises(HydraError, match="an evaluation has 4 processes"):
        gpus_of_workers(plan, [0])
    with pytest.raises(HydraError, match="evaluation: processes is 0, below 1"):
        load_experiment(write("variants: {a: {evaluation: {processes: 0}}}"))


def test_what_is_left_when_the_time_is_over_is_no_success(write, tmp_path):
    lines: list[str] = []
    assert run(Request([write(ROWS)], tmp_path / "s", stop_after=0), lines.append) == 85
    assert lines[-2] == "the time is over: 6 of 6 cells are not finished"
    assert (tmp_path / "s" / "trial" / "table.md").is_file()


def test_nothing_to_draw_yet(write, tmp_path):
    lines: list[str] = []
    request = Request([write(ROWS)], tmp_path / "s")
    assert show(request, lines.append) == 1
    assert "6 of 6 cells are not there" in lines[-1]
    with pytest.raises(HydraError, match="no cell is finished yet"):
        draw(request, lines.append)


def test_slurm_gets_an_array_of_the_cells_that_are_missing(write, tmp_path, capfd):
    path = write(ROWS)
    store, plan = StepStore(tmp_path / "s"), make_plan(load_experiment(path).cells)
    store.finish(plan.steps[plan.cells["trial / dense / seed 1"]], 1.0)
    options = ["--dry-run", "--gpus-per-node", "8", "--time", "1:00:00"]
    lines: list[str] = []
    assert run(Request([path], tmp_path / "s", slurm=options), lines.append) == 0
    assert lines == ["5 of 6 cells are not finished"]
    (array,) = (tmp_path / "s").glob("array-*.txt")
    missing = [name for name in plan.cells if name != "trial / dense / seed 1"]
    assert array.read_text().splitlines() == [f"--cell {as_word(name)}" for name in missing]
    out = capfd.readouterr().out
    assert "--array=0-4" in out and "--time=1:00:00" in out and "--gpus-per-node=8" in out
    assert "agent.py" not in out  # one process, not one for each GPU
    assert f"experiment.py run {path}" in out and "--workers 1" in out


def test_a_task_computes_the_cell_that_was_submitted(write, tmp_path, monkeypatch):
    """This holds whichever rows were left out, and if other rows of the file have changed."""
    output = tmp_path / "s"
    for only in ("hydra", "gated"):
        request = Request([write(ROWS)], output, only=[only], slurm=["--dry-run", "--time", "1"])
        assert run(request, lambda _: None) == 0
    arrays = [path.read_text().split() for path in output.glob("array-*.txt")]
    assert sorted(words[0] for words in arrays) == ["--cell", "--cell"]  # none replaced another
    (word,) = [words[1] for words in arrays if "hydra" in words[1]]
    computed = []
    monkeypatch.setattr(
        "megatron_hydra.experiments.command.run_plan",
        lambda plan, *_, **__: computed.extend(plan.cells) or [],
    )
    path = write("variants: {new: {}, dense: {hf_model: teacher}, hydra: {}}")
    assert run(Request([path], output, cell=word), lambda _: None) == 0
    assert computed == ["trial / hydra / seed 0"]


def test_tasks_read_the_same_base(write, tmp_path, capfd):
    base = write("", name="base")
    path = tmp_path / "rows.yaml"
    path.write_text("title: Rows\nvariants: {a: {}}\n")
    options = ["--dry-run", "--time", "1"]
    assert run(Request([path], tmp_path / "s", base=base, slurm=options), lambda _: None) == 0
    assert f"experiment.py run {path} --base {base}" in capfd.readouterr().out


def test_slurm_refuses_paths_that_an_array_line_cannot_hold(write, tmp_path):
    request = Request([write(ROWS)], tmp_path / "a folder", slurm=[])
    with pytest.raises(HydraError, match="holds a blank"):
        run(request, print)


@pytest.mark.slow
def test_the_chain_in_miniature(write, tmp_path):
    """Two rows and a broken one give tables and pictures. A second run does nothing."""
    broken = "broken: {stages: {align: {set: {data.sequence_length: 64}}}}"
    path = write(
        "variants: {dense: {hf_model: teacher}, hydra: {}, gated: {hydra: {fusion: gated}}, "
        + broken
        + "}\n"
    )
    output = tmp_path / "s"
    command = [sys.executable, str(ROOT / "tools" / "experiment.py")]
    arguments = [str(path), "--output", str(output)]
    done = subprocess.run(
        [*command, "run", *arguments, "--workers", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: trial / broken / seed 0: align: needles: 24 pairs" in done.stdout
    assert "2 of 8 cells failed" in done.stdout
    results = json.loads((output / "trial" / "results.json").read_text())
    states = {(c["variant"], c["seed"]): c["state"] for c in results["cells"]}
    assert [k for k, state in states.items() if state != "done"] == [("broken", 0), ("broken", 1)]
    cells = {(c["variant"], c["seed"]): c for c in results["cells"]}
    assert cells["dense", 0]["accuracy"]["facts@128"] > 0.9
    assert cells["hydra", 0]["kv_bytes_per_token"] < cells["dense", 0]["kv_bytes_per_token"]
    assert sum(map(len, cells["hydra", 1]["fa_heads"])) == 8  # a quarter of 32: the default, 3:1

    plotted = subprocess.run([*command, "plot", *arguments], capture_output=True, check=False)
    assert plotted.returncode == 0 and (output / "trial" / "trial_facts.png").is_file()

    # A worker that has computed other steps gives the same bits as a new process.
    fresh = tmp_path / "fresh"
    for variant in ("gated", "hydra"):
        alone = [*command, "run", str(path), "--output", str(fresh / variant), "--only", variant]
        subprocess.run([*alone, "--workers", "1"], check=True, capture_output=True)
        (key,) = [
            k
            for name, k in make_plan(load_experiment(path).cells).cells.items()
            if name == f"trial / {variant} / seed 1"
        ]
        ours, theirs = (
            json.loads((root / "steps" / f"evaluate-{key}" / "out" / "results.json").read_text())
            for root in (output, fresh / variant)
        )
        assert ours["settings"]["weights"] == theirs["settings"]["weights"]


BUDGET = """
variants:
  dense: {hf_model: teacher}
  budget:
    selection: {ratio: dense}
    hydra: {fusion: concat, fusion_norm: none, fa_position: rope, fa_gate: false}
    stages: {align: {skip: true}}
"""


@pytest.mark.slow
def test_a_skipped_stage_and_a_dense_student_are_trained(write, tmp_path):
    """The dense row trains the teacher with its own attention through the remaining stages."""
    path = write(BUDGET, body=BODY.replace("[0, 1]", "[0]"))
    request = Request([path], tmp_path / "s", workers=1)
    assert run(request, print) == 0
    kinds = {folder.name.split("-")[0] for folder in (tmp_path / "s" / "steps").iterdir()}
    assert "distill" in kinds and "align" not in kinds
    results = json.loads((tmp_path / "s" / "trial" / "results.json").read_text())
    dense, budget = results["cells"]
    assert sum(map(len, budget["fa_heads"])) == 32 and dense["attention"] == "all"
    assert budget["kv_bytes_per_token"] == dense["kv_bytes_per_token"]
    assert budget["accuracy"]["facts@128"] == pytest.approx(dense["accuracy"]["facts@128"], abs=0.1)
