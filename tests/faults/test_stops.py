"""Selection and evaluation stop like training: finished work is saved, the status is 85, a rerun resumes."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_hydra.stopping import REQUEUE_EXIT_CODE, Stopped
from tests.selection.helpers import tiny_model

pytestmark = pytest.mark.timeout(1800)  # processes import torch, and the machine may be busy

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen3").save_pretrained(folder)
    return folder


def _stopped(command: list[str], until: Callable[[], bool], whom: Callable[[int], int]) -> str:
    """Start the command, signal one process when it has partial work, and wait; returns stderr."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    end = time.monotonic() + 240
    while not until():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.002)
    os.kill(whom(process.pid), signal.SIGTERM)
    error = process.communicate(timeout=240)[1]
    assert process.returncode == REQUEUE_EXIT_CODE, error[-3000:]
    return error


@pytest.mark.slow
def test_selection_stops_on_all_ranks_and_resumes(model: Path, tmp_path: Path, table) -> None:
    arguments = [
        "--hf-path", str(model), "--tasks", "induction:length=12", "--solved", "off",
        "--num-prompts", "24", "--tokens-per-batch", "200", "--ratio", "5:1", "--no-pictures",
    ]  # fmt: skip
    tool = str(ROOT / "tools" / "select_heads.py")

    def command(output: Path, processes: int) -> list[str]:
        if processes == 1:
            return [sys.executable, tool, *arguments, "--output", str(output)]
        agent = [sys.executable, str(ROOT / "launch" / "agent.py"), "--standalone"]
        return [*agent, "--nproc-per-node", "2", tool, *arguments, "--output", str(output)]

    whole, stopped = tmp_path / "whole.json", tmp_path / "stopped.json"
    subprocess.run(command(whole, 1), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    _stopped(
        command(stopped, 2),
        lambda: bool(list(tmp_path.glob("stopped.json.work/*/receivers*"))),
        lambda agent: psutil.Process(agent).children()[1].pid,  # rank 1 alone
    )
    assert not stopped.exists()
    kept = list(tmp_path.glob("stopped.json.work/*/receivers*"))
    subprocess.run(command(stopped, 2), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert stopped.read_bytes() == whole.read_bytes()
    table(
        "SIGTERM to one of two ranks of head selection", 1, 1,
        f"both exit with 85, {len(kept)} results kept; the map is byte-equal after resuming",
    )  # fmt: skip


_HANGS = """
import os, runpy, sys, time
from megatron_hydra.selection.work import WorkBench
write = WorkBench._write
def hang(self, chunk, result):
    write(self, chunk, result)
    if os.environ["RANK"] == "1":
        open(mark, "w").close()
        time.sleep(3600)
WorkBench._write = hang
tool, mark, sys.argv = sys.argv[1], sys.argv[-1], sys.argv[1:-1]
runpy.run_path(tool, run_name="__main__")
"""


@pytest.mark.slow
def test_a_hung_rank_ends_the_selection(model: Path, tmp_path: Path, table) -> None:
    (tmp_path / "hangs.py").write_text(_HANGS)
    command = [
        sys.executable, str(ROOT / "launch" / "agent.py"), "--standalone", "--nproc-per-node", "2",
        str(tmp_path / "hangs.py"), str(ROOT / "tools" / "select_heads.py"),
        "--hf-path", str(model), "--tasks", "induction:length=12", "--solved", "off",
        "--num-prompts", "24", "--tokens-per-batch", "200", "--no-pictures", "--timeout", "8",
        "--ratio", "5:1",
        "--output", str(tmp_path / "map.json"), str(tmp_path / "mark"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (tmp_path / "mark").exists(), done.stderr[-3000:]
    seconds = time.time() - (tmp_path / "mark").stat().st_mtime
    assert done.returncode not in (0, 85), done.stderr[-3000:]
    assert "Timeout (" in done.stderr  # the watchdog ended it: the hang lasts an hour
    assert "in hang" in done.stderr  # the place where rank 1 hung
    table(
        "a rank of head selection hangs (--timeout 8)", 1, 1,
        f"both processes have ended {seconds:.0f} s later, non-zero exit, stacks",
    )  # fmt: skip


@pytest.mark.slow
def test_evaluation_stops_and_resumes(tmp_path: Path, table) -> None:
    folder = ROOT / "megatron_hydra" / "quickstart" / "shipped_teacher"
    command = [
        sys.executable, str(ROOT / "tools" / "evaluate.py"), "--model", str(folder), "--tasks",
        "niah_single_1", "--lengths", "600,700,800", "--samples", "2", "--depths", "3",
        "--output", str(tmp_path / "out"), "--quiet",
    ]  # fmt: skip
    cells = tmp_path / "out/cells"
    error = _stopped(command, lambda: bool(list(cells.glob("*.json"))), lambda pid: pid)
    assert "the same command resumes from here" in error
    assert not (tmp_path / "out/results.json").exists()
    first = sorted(cells.glob("*.json"))[0]
    before = first.stat().st_mtime_ns
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert first.stat().st_mtime_ns == before  # reused, not done again
    assert (tmp_path / "out/results.json").exists()
    table("SIGTERM to an evaluation", 1, 1, "exits with 85; finished cells are kept")


def test_an_evaluation_stopped_while_loading_exits_with_85(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "evaluate.py"))
    globals_of_tool = tool["main"].__wrapped__.__globals__

    def load(*_args: object, **_settings: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def not_listening(number: int, _frame: object) -> None:
        raise AssertionError("the signal would have ended the process")

    monkeypatch.setitem(globals_of_tool, "load_hf_model", load)
    monkeypatch.setitem(globals_of_tool, "find_tokenizer", lambda *_args, **_settings: None)
    before = signal.signal(signal.SIGTERM, not_listening)
    try:
        with pytest.raises(Stopped):
            tool["main"](
                ["--model", "m", "--tasks", "niah_single_1", "--lengths", "600",
                 "--output", str(tmp_path / "out")]
            )  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "out").exists()
