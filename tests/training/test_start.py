"""The start of a run: early errors, messages and times."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.model import layer_spec
from megatron_hydra.ops.compiler_output import COMPILE_LOG
from megatron_hydra.ops.kernels import Case
from megatron_hydra.parallel import platform
from megatron_hydra.reporting import EVENTS_FILE
from megatron_hydra.training import loop, start
from megatron_hydra.training.loop import run_training
from megatron_hydra.training.start import prepare_node
from megatron_hydra.training.warm_up import WarmUp
from megatron_hydra.warm import main as warm
from tests.training import tiny


def test_the_time_to_the_first_step_is_an_event_and_a_line(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tiny.run_config(inputs, "distill", str(tmp_path / "run"), schedule={"steps": 2})
    assert run_training(config) == 0
    lines = (tmp_path / "run" / EVENTS_FILE).read_text().splitlines()
    (event,) = [e for e in map(json.loads, lines) if e["event"] == "first step"]
    assert event["step"] == 1
    parts = event["seconds"]
    assert "imports" not in parts  # logged by other tests of this process
    assert {
        "process group", "verifying checkpoints", "data", "model", "weights", "optimizer",
        "resuming", "first step",
    } <= set(parts)  # fmt: skip
    assert sum(parts.values()) == pytest.approx(event["total"], abs=0.5)
    assert all(seconds >= 0 for seconds in parts.values())
    said = [r.getMessage() for r in caplog.records if "after the start" in r.getMessage()]
    assert len(said) == 1
    assert f"first step {event['total']:.1f} s after the start: " in said[0]
    assert ": " in said[0] and " s" in said[0].split(": ", 1)[1]


def test_a_layout_for_more_processes_is_refused_before_ranks_connect(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "start_world", lambda config: pytest.fail("ranks were to meet"))
    config = tiny.run_config(inputs, "finetune", str(tmp_path / "run"), parallel={"tensor": 4})
    with pytest.raises(HydraError, match=r"= 4·1·1 = 4 processes, one a GPU, but this run has 1"):
        run_training(config)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Pretend a node with two GPUs at the start; returns the GPUs of the calls that compile kernels."""
    calls: list[Any] = []
    monkeypatch.setattr(platform, "device_count", lambda: 2)
    monkeypatch.setattr(platform, "bind_process_to_device", calls.append)

    def compile_(*args: Any, **options: Any) -> WarmUp:
        calls.append(options["local_rank"])
        options["tell"]("compiling kernels: 0 of 3 done")
        options["tell"]("another process compiles this run's kernels: waiting")
        return WarmUp(False, 3, 2.0, "scene 1: OutOfResources")

    monkeypatch.setattr(start, "compile_once_per_node", compile_)
    monkeypatch.setattr(start, "slow_paths", lambda backend, case: [f"slow with {case.gdn_heads}"])
    return calls


@pytest.mark.parametrize("rank", [0, 1])
def test_kernels_are_prepared_on_the_ranks_own_gpu(
    inputs: Path, tmp_path: Path, gpu: list[Any], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, rank: int,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = tiny.run_config(inputs, "finetune", str(tmp_path / "run"))
    with contextlib.ExitStack() as starting:
        result = prepare_node(config, starting)
        os.write(1, b"a listing\n")
    assert result is not None
    assert gpu == [rank, rank]
    assert "a listing" in (tmp_path / "run" / COMPILE_LOG).read_text()
    said = [record.getMessage() for record in caplog.records]
    assert ("slow with (6, 8)" in said) == (rank == 0)  # once for each run
    assert "compiling kernels: 0 of 3 done" in said  # whichever rank it is
    assert any("waiting" in text for text in said) == (rank == 0)
    (warning,) = [text for text in said if "OutOfResources" in text]
    assert str(tmp_path / "run" / COMPILE_LOG) in warning


def test_the_case_has_the_numbers_of_heads_of_the_ranks(tmp_path: Path) -> None:
    config = tiny.run_config(tmp_path, "finetune", "run", parallel={"tensor": 2})
    model = tiny.student_config(tiny.DEEP)  # 2, 0, 3, 1 FA heads of 8
    every = layer_spec.kernel_case(model, config)
    assert isinstance(every, Case)
    assert every.gdn_heads == (2, 3, 4)
    own = [layer_spec.kernel_case(model, config, rank).gdn_heads for rank in (0, 1)]
    assert set().union(*own) == {2, 3, 4}
    assert layer_spec.kernel_case(tiny.DEEP, config).gdn_heads == ()


def test_the_command_without_a_gpu_and_with_one(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megatron_hydra.config.loading import to_yaml

    config = tiny.run_config(inputs, "finetune", str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command = ["--config", str(tmp_path / "run.yaml")]
    assert warm(command) == 0
    assert "this machine has no GPU, so no kernel is compiled" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()

    monkeypatch.setattr(platform, "device_count", lambda: 1)
    monkeypatch.setattr(platform, "bind_process_to_device", lambda rank: None)
    for result, status, words in (
        (WarmUp(True, 3, 41.0), 0, "ready: compiled in 41 s"),
        (WarmUp(True, 0, 0.1), 0, "were ready"),
        (WarmUp(False, 3, 9.0, "scene 1: OutOfResources"), 2, "scene 1: OutOfResources"),
    ):
        monkeypatch.setattr(start, "compile_once_per_node", lambda *a, r=result, **k: r)
        assert warm(command) == status
        said = capsys.readouterr()
        assert words in said.out + said.err
