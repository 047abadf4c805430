"""A map does not depend on the number of ranks, nor on a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parallel.launch import ROOT, torchrun
from tests.selection.helpers import tiny_model

pytestmark = pytest.mark.parallel

ARGUMENTS = [
    *("--tasks", "induction:length=12", "--solved", "off", "--num-prompts", "12"),
    *("--tokens-per-batch", "400", "--ratio", "5:1", "--no-pictures"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_three_ranks_write_the_map_of_one(folder: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / f"{n}.json" for n in (1, 3)]
    for processes, output in zip((1, 3), outputs, strict=True):
        paths = ["--hf-path", str(folder), "--output", str(output)]
        torchrun("tools.select_heads", processes, *paths, *ARGUMENTS)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.json", "3.json", "model"]


def test_a_run_that_was_killed_resumes_to_the_same_map(folder: Path, tmp_path: Path) -> None:
    def command(output: Path) -> list[str]:
        tool = [sys.executable, str(ROOT / "tools" / "select_heads.py")]
        return [*tool, "--hf-path", str(folder), "--output", str(output), *ARGUMENTS]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    subprocess.run(command(whole), check=True, capture_output=True, env=environment)
    process = subprocess.Popen(command(resumed), stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("resumed.json.work/*/total-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not resumed.exists()
    subprocess.run(command(resumed), check=True, capture_output=True, env=environment)
    assert resumed.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "resumed.json.work").exists()
