"""A miniature of the whole chain: two steps a stage, few prompts and samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.quickstart.run import Settings, run_quickstart
from megatron_hydra.quickstart.workspace import STAGES, STUDENTS

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
    from megatron_hydra.quickstart.workspace import Workspace

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
