"""The quickstart's recipe, settings, commands and page; the slow tests run the whole chain on tiny models."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.plan import make_plan
from megatron_hydra.experiments.quickstart import (
    Settings,
    commands_by_hand,
    load_recipe,
    run_quickstart,
)
from megatron_hydra.experiments.quickstart_page import collect_metrics, table
from megatron_hydra.experiments.results import collect
from megatron_hydra.experiments.store import StepStore
from megatron_hydra.stopping import REQUEUE_EXIT_CODE
from tests.test_head_map import tiny_map

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "quickstart"
SHORT = ("schedule.steps=2", "schedule.warmup_steps=1", "batch.global_batch_size=2")
SHORT += ("batch.micro_batch_size=2",)
STAGES = ("align", "distill", "finetune")
STUDENTS = ("hydra", "random", "all_gdn")
LENGTHS = {"128", "256", "512", "1024"}


def planned(settings=None, configs=CONFIGS):
    experiment = load_recipe(configs, settings or Settings())
    return experiment, make_plan(experiment.cells)


def steps_of(plan, row, seed=0):
    keys = plan.ancestors(plan.cells[f"quickstart / {row} / seed {seed}"])
    return {plan.steps[key].kind: plan.steps[key] for key in keys}


def test_a_folder_without_a_recipe_is_named(tmp_path):
    with pytest.raises(HydraError, match=r"no quickstart\.yaml"):
        run_quickstart(tmp_path / "q", tmp_path, Settings())
    with pytest.raises(HydraError, match=r"--set 'steps' is not of the form"):
        run_quickstart(tmp_path / "q", CONFIGS, Settings(overrides=("steps",)))
    with pytest.raises(HydraError, match=r"schedule\.stepz"):
        run_quickstart(tmp_path / "q", CONFIGS, Settings(overrides=("schedule.stepz=1",)))
    assert not (tmp_path / "q").exists()


def test_the_students_differ_in_their_heads_alone():
    _, plan = planned(Settings(seed=3))
    hydra, random, all_gdn = (steps_of(plan, row, 3) for row in STUDENTS)
    assert hydra["teacher"] == random["teacher"] == all_gdn["teacher"]
    selections = [steps["select"].params["selection"] for steps in (hydra, random, all_gdn)]
    assert [s["ratio"] for s in selections] == ["7:1", "7:1", "all-gdn"]
    assert selections[0]["strategy"] == "global_interp"
    assert selections[1]["strategy"] == "global_random"
    for kind in STAGES:
        assert hydra[kind].params == random[kind].params == all_gdn[kind].params
    configs = [hydra[kind].params["config"] for kind in STAGES]
    assert [config["verb"] for config in configs] == list(STAGES)
    assert ["teacher" in hydra[kind].inputs for kind in STAGES] == [True, True, False]
    assert len({config["data"]["seed"] for config in configs}) == 3
    lengths = [config["data"]["sequence_length"] for config in configs]
    assert lengths[2] > lengths[0] == lengths[1] == 128


def test_settings_reach_the_steps(tmp_path):
    _, plan = planned()
    before = steps_of(plan, "hydra")
    _, plan = planned(Settings(samples=5, overrides=("schedule.steps=17",)))
    after = steps_of(plan, "hydra")
    assert after["convert"].key == before["convert"].key
    assert [after[kind].params["config"]["schedule"]["steps"] for kind in STAGES] == [17, 17, 17]
    samples = [s["evaluate"].params["evaluation"]["samples"] for s in (before, after)]
    assert samples == [32, 5]
    configs = shutil.copytree(CONFIGS, tmp_path / "configs")
    text = (configs / "distill.yaml").read_text()
    (configs / "distill.yaml").write_text(text.replace("lr: 3.0e-3", "lr: 2.0e-3"))
    _, plan = planned(configs=configs)
    changed = steps_of(plan, "hydra")
    assert changed["align"].key == before["align"].key
    assert changed["distill"].key != before["distill"].key


def test_commands_survive_a_folder_with_a_space(tmp_path):
    experiment, plan = planned(Settings(overrides=("schedule.steps=17",)))
    store = StepStore(tmp_path / "my runs")
    text = commands_by_hand(experiment, plan, store)
    commands = [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]
    assert len(commands) == 8
    assert all(words[0] == "python" for words in commands)
    for words in commands[:3]:
        assert words[words.index("--output") + 1].startswith(f"{tmp_path}/my runs/")
    align, distill, finetune = commands[3:6]
    output = next(word for word in align if word.startswith("output=")).removeprefix("output=")
    assert f"student.checkpoint={output}/checkpoints" in distill
    assert [any(w.startswith("teacher.") for w in c) for c in (align, distill, finetune)] == [
        True, True, False,
    ]  # fmt: skip
    assert all("schedule.steps=17" in words for words in (align, distill, finetune))


def test_metrics_and_table_of_finished_cells(tmp_path):
    experiment, plan = planned()
    store = StepStore(tmp_path)
    for row, share in zip((*STUDENTS, "teacher"), (1.0, 0.25, 0.0, 0.5), strict=True):
        steps = steps_of(plan, row)
        for step in steps.values():
            store.out(step).mkdir(parents=True, exist_ok=True)
            store.finish(step, 1.5)
        if "select" in steps:
            tiny_map().save(store.out(steps["select"]) / "head_map.json")
        cells = {n: {"accuracy": share, "answers": 8} for n in ("128", "1024")}
        body = {"tasks": {"facts": cells}, "cache": {"kv_bytes_per_token": 512, "state_bytes": 7}}
        (store.out(steps["evaluate"]) / "results.json").write_text(json.dumps(body))
    metrics = collect_metrics(collect(experiment, plan, store), plan, store)
    assert metrics["models"] == ["teacher", *STUDENTS]
    assert metrics["hydra"] == {"128": 1.0, "1024": 1.0} and metrics["teacher"]["1024"] == 0.5
    assert (metrics["ratio"], metrics["train_length"], metrics["answers_per_cell"]) == (
        "7:1", 128, 8,
    )  # fmt: skip
    assert set(metrics["full_attention_heads"]) == set(STUDENTS)
    assert metrics["seconds"]["random_distill"] == metrics["seconds"]["teacher_evaluate"] == 1.5
    lines = table(metrics).splitlines()
    assert "1024 (8×)" in lines[1]
    assert lines[2].split() == ["teacher", "(dense)", "0.500", "0.500", "512", "7"]
    assert lines[3].split()[:2] == ["HydraHead", "1.000"]


# -- the whole chain ------------------------------------------------------------------------------


@pytest.mark.slow
def test_miniature_end_to_end(tmp_path):
    configs, output = tmp_path / "configs", tmp_path / "q"
    configs.mkdir()
    (configs / "quickstart.yaml").write_text(
        f"include: {CONFIGS}/quickstart.yaml\n"
        "base: {prepare: {options: {prompts: 6}}, selection: {num_prompts: 6, min_prompts: 3}}\n"
    )
    settings = Settings(seed=1, samples=2, overrides=SHORT)
    lines: list[str] = []
    metrics = run_quickstart(output, configs, settings, say=lines.append)
    assert metrics == json.loads((output / "metrics.json").read_text())
    for model in ("teacher", *STUDENTS):
        assert set(metrics[model]) == LENGTHS
        assert all(0 <= accuracy <= 1 for accuracy in metrics[model].values())
    assert metrics["teacher"]["128"] >= 0.9
    assert (metrics["train_length"], metrics["ratio"], metrics["seed"]) == (128, "7:1", 1)

    # Keys and values of 16 channels in fp32; the dense model has 4 KV heads in each of 4 layers.
    cache = metrics["kv_cache_bytes_per_token"]
    assert cache["teacher"] == 4 * 4 * 2 * 16 * 4
    for student in STUDENTS:
        heads = metrics["full_attention_heads"][student]
        kv_heads = sum(len({head // 2 for head in layer}) for layer in heads)
        assert cache[student] == kv_heads * 2 * 16 * 4
    assert [sum(map(len, metrics["full_attention_heads"][s])) for s in STUDENTS] == [4, 4, 0]

    for name in (
        "head_importance.png",
        "retrieval.png",
        "losses.png",
        "head_maps/hydra_layers.png",
    ):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert any("HydraHead" in line and "random heads" in line for line in lines)
    checked = subprocess.run(["bash", "-n", str(output / "commands.sh")], check=False)
    assert checked.returncode == 0

    # A second run skips everything and gives the same results.
    again: list[str] = []
    assert run_quickstart(output, configs, settings, say=again.append) == metrics
    assert "24 steps, 24 of them finished before" in again


@pytest.mark.slow
def test_a_failing_student_is_reported_with_its_log(tmp_path):
    """The command ends with one line and status 2."""
    command = [sys.executable, str(ROOT / "tools" / "quickstart.py"), "--samples", "1"]
    command += ["--output", str(tmp_path / "q"), "--set", "data.sequence_length=64"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 2
    assert "do not fit" in done.stderr and "log.txt" in done.stderr
    assert not (tmp_path / "q" / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(2700)  # the sum of its waits
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_quickstart_ends_its_students_and_goes_on(tmp_path, number):
    """``timeout`` sends SIGTERM to the command alone; a terminal sends Ctrl-C to all processes."""
    output = tmp_path / "q"
    command = [sys.executable, str(ROOT / "tools" / "quickstart.py"), "--samples", "1"]
    command += ["--output", str(output)]
    for word in (*SHORT, "schedule.steps=40"):
        command += ["--set", word]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 900
    while not any(
        path.read_text().count("\n") for path in output.glob("steps/align-*/out/m*.jsonl")
    ):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    lines, errors = process.communicate(timeout=300)
    assert process.returncode == REQUEUE_EXIT_CODE, errors
    assert "the same command resumes" in lines and "Traceback" not in errors
    for claim in output.glob("steps/*/claim.json"):  # of a student that had saved nothing yet
        with pytest.raises(ProcessLookupError):
            os.kill(json.loads(claim.read_text())["pid"], 0)
    assert list(output.glob("steps/align-*/stopped.json"))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr
    events = [
        json.loads(line)["event"]
        for path in output.glob("steps/align-*/out/events.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert "resume" in events
