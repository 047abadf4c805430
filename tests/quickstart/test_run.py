"""A miniature of the whole chain: two steps a stage, few prompts and samples."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.quickstart import run as chain
from megatron_hydra.quickstart import student as one_student
from megatron_hydra.quickstart.run import Settings, commands_by_hand, fingerprints, run_quickstart
from megatron_hydra.quickstart.workspace import STAGES, STUDENTS, Workspace
from megatron_hydra.stopping import REQUEUE_EXIT_CODE, Stopped

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "quickstart"
SHORT = ("schedule.steps=2", "schedule.warmup_steps=1", "batch.global_batch_size=2")
SHORT += ("batch.micro_batch_size=2",)
LENGTHS = {"128", "256", "512", "1024"}


def test_missing_config_is_named(tmp_path):
    with pytest.raises(HydraError, match=r"no common\.yaml"):
        run_quickstart(tmp_path / "q", tmp_path, Settings())
    assert not (tmp_path / "q").exists()


def test_stage_configs_are_valid_and_chained(tmp_path):
    from megatron_hydra.config.loading import load_run_config
    from megatron_hydra.quickstart.student import stage_config

    settings = {"seed": 3, "overrides": []}
    workspace = Workspace(tmp_path)
    runs = [
        load_run_config(*stage_config(workspace, "random", stage, CONFIGS, settings))
        for stage in STAGES
    ]
    assert [run.verb for run in runs] == list(STAGES)
    assert runs[0].student.checkpoint == str(workspace.initial("random"))
    for before, run in zip(runs, runs[1:]):
        assert run.student.checkpoint == f"{before.output}/checkpoints"
    assert [bool(run.teacher.checkpoint) for run in runs] == [True, True, False]
    assert len({run.data.seed for run in runs}) == 3
    assert runs[2].data.sequence_length > runs[0].data.sequence_length == 128


def test_a_run_belongs_to_its_configs_its_teacher_and_the_version(tmp_path, monkeypatch):
    configs = shutil.copytree(CONFIGS, tmp_path / "configs")
    before = fingerprints(configs)
    assert set(before) == {*(f"{n}.yaml" for n in ("common", *STAGES)), "teacher", "version"}
    with Workspace(tmp_path / "q").opened({"seed": 0, **before}, fresh=False):
        pass
    with open(configs / "distill.yaml", "a") as file:
        file.write("# changed\n")
    refused = pytest.raises(HydraError, match=r"holds a run with distill\.yaml = ")
    changed = {"seed": 0, **fingerprints(configs)}
    with refused, Workspace(tmp_path / "q").opened(changed, fresh=False):
        pass


def test_commands_survive_a_folder_with_a_space(tmp_path):
    workspace = Workspace(tmp_path / "my runs")
    settings = {"seed": 0, "prompts": 4, "samples": 2, "overrides": []}
    text = commands_by_hand(workspace, CONFIGS, settings)
    commands = [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]
    assert len(commands) == 8
    assert all(words[0] == "python" for words in commands)
    for words in commands[:3]:
        assert words[words.index("--output") + 1].startswith(f"{tmp_path}/my runs/")


def test_every_student_imports_its_exports_code_from_a_folder_of_its_own(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: calls.append(options))
    workspace = Workspace(tmp_path)
    (tmp_path / "logs").mkdir()
    for name in STUDENTS:
        chain._start(workspace, name, CONFIGS)
    folders = {options["env"]["HF_MODULES_CACHE"] for options in calls}
    assert folders == {str(tmp_path / "modules" / name) for name in STUDENTS}


# -- stopping and going on ------------------------------------------------------------------------


def _stopped_stage(folder: Path, optimizer: bool) -> None:
    checkpoint = folder / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "training.json").write_text(json.dumps({"optimizer": optimizer}))


@pytest.mark.parametrize("kept", ["with_optimizer", "without_optimizer", "damaged"])
def test_a_stage_that_cannot_be_resumed_begins_anew(tmp_path, monkeypatch, kept):
    workspace = Workspace(tmp_path)
    folder = workspace.run("hydra", "align")
    _stopped_stage(folder, optimizer=kept == "with_optimizer")
    if kept != "damaged":
        monkeypatch.setattr("megatron_hydra.checkpoint.store.verify_checkpoint", lambda _: {})
    found = []

    def trainer(_arguments):
        found.append(folder.exists())
        return 0

    monkeypatch.setattr("megatron_hydra.train.main", trainer)
    one_student._train_stage(workspace, "hydra", "align", CONFIGS, {"seed": 0, "overrides": []})
    assert found == [kept == "with_optimizer"]


def test_a_stopped_stage_is_no_failure(tmp_path, monkeypatch):
    settings = {"seed": 0, "overrides": []}
    for status, error in ((REQUEUE_EXIT_CODE, Stopped), (2, HydraError)):
        monkeypatch.setattr("megatron_hydra.train.main", lambda _, status=status: status)
        with pytest.raises(error):
            one_student._train_stage(Workspace(tmp_path), "hydra", "align", CONFIGS, settings)


@pytest.mark.parametrize("is_ours", [True, False])
def test_an_export_with_older_code_is_made_anew(tmp_path, monkeypatch, is_ours):
    """Or the resumed run would end with the demand for --trust-remote-code."""
    workspace, calls = Workspace(tmp_path), []
    for phase in (*STAGES, "export"):
        with workspace.phase(f"hydra_{phase}"):
            pass
    monkeypatch.setattr(one_student, "carries_our_code", lambda _: is_ours)
    monkeypatch.setattr(
        "megatron_hydra.conversion.convert.megatron_to_hf",
        lambda *_, **__: calls.append("export"),
    )
    monkeypatch.setattr(one_student, "evaluate_model", lambda *_: calls.append("evaluate"))
    one_student.run_student(workspace, "hydra", CONFIGS, {})
    assert calls == (["evaluate"] if is_ours else ["export", "evaluate"])


def test_students_are_stopped_together(tmp_path):
    """Each is given the time to save, but not one after the other."""
    program = "import signal, sys, time\n"
    program += "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(85)))\n"
    program += "print(flush=True)\ntime.sleep(60)"
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(3)
    ]
    for process in processes:
        process.stdout.readline()
    chain._end(processes)
    assert [process.returncode for process in processes] == [85, 85, 85]
    for process in processes:
        process.stdout.close()


@pytest.mark.slow
def test_miniature_end_to_end(tmp_path):
    output = tmp_path / "quickstart"
    settings = Settings(seed=1, prompts=6, samples=2, overrides=SHORT)
    lines: list[str] = []
    metrics = run_quickstart(output, CONFIGS, settings, say=lines.append)
    assert metrics == json.loads((output / "metrics.json").read_text())
    for model in ("teacher", *STUDENTS):
        assert set(metrics[model]) == LENGTHS
        assert all(0 <= accuracy <= 1 for accuracy in metrics[model].values())
    assert metrics["teacher"]["128"] >= 0.9
    assert (metrics["train_length"], metrics["ratio"], metrics["seed"]) == (128, "7:1", 1)
    phases = {"select", "convert", "train", "teacher_evaluate"}
    phases |= {f"{s}_{p}" for s in STUDENTS for p in (*STAGES, "export", "evaluate")}
    assert set(metrics["seconds"]) == phases

    # Keys and values of 16 channels in fp32; the dense model has 4 KV heads in each of 4 layers.
    cache = metrics["kv_cache_bytes_per_token"]
    assert cache["teacher"] == 4 * 4 * 2 * 16 * 4
    for student in STUDENTS:
        heads = metrics["full_attention_heads"][student]
        kv_heads = sum(len({head // 2 for head in layer}) for layer in heads)
        assert cache[student] == kv_heads * 2 * 16 * 4
    assert [sum(map(len, metrics["full_attention_heads"][s])) for s in STUDENTS] == [4, 4, 0]

    for name in ("head_importance.png", "retrieval.png", "losses.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert any("HydraHead" in line and "random heads" in line for line in lines)
    checked = subprocess.run(["bash", "-n", str(output / "commands.sh")], check=False)
    assert checked.returncode == 0

    # Again: everything is skipped, and the results are the same.
    again: list[str] = []
    assert run_quickstart(output, CONFIGS, settings, say=again.append) == metrics
    assert sum("done before" in line for line in again) == 4


@pytest.mark.slow
def test_failing_student_is_reported_with_its_log(tmp_path):
    """The command ends with one line and status 2, the other students are stopped."""
    command = [sys.executable, str(ROOT / "tools" / "quickstart.py"), "--samples", "1"]
    command += ["--output", str(tmp_path / "q"), "--set", "data.sequence_length=64"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 2
    assert "do not fit" in done.stderr and ".log" in done.stderr
    assert not (tmp_path / "q" / "metrics.json").exists()


@pytest.mark.slow
def test_a_stopped_quickstart_ends_its_students_and_goes_on(tmp_path):
    """SIGTERM to the command alone, as ``timeout`` sends it."""
    output = tmp_path / "q"
    command = [sys.executable, str(ROOT / "tools" / "quickstart.py"), "--samples", "1"]
    command += ["--output", str(output)]
    for word in (*SHORT, "schedule.steps=40"):
        command += ["--set", word]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics = output / "runs" / "hydra" / "align" / "metrics.jsonl"
    deadline = time.monotonic() + 900
    while not (metrics.is_file() and metrics.read_text().count("\n")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == REQUEUE_EXIT_CODE, errors
    assert "the same command resumes" in errors
    # Refused if a student were still alive, for it would hold the lock.
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr
    events = (metrics.parent / "events.jsonl").read_text().splitlines()
    assert "resume" in {json.loads(line)["event"] for line in events}
