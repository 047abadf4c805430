"""A map does not depend on the number of ranks, nor on a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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


# Killed by itself, right after its first total effects lie on disk: from outside the moment is missed
# on a busy machine.
_KILLED = """
import os, runpy, signal, sys
from megatron_hydra.selection.work import WorkBench

write = WorkBench._write

def write_and_die(self, chunk, result):
    write(self, chunk, result)
    if chunk.key.startswith("total-"):
        os.kill(os.getpid(), signal.SIGKILL)

WorkBench._write = write_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_that_was_killed_resumes_to_the_same_map(folder: Path, tmp_path: Path) -> None:
    def run(output: Path, *before: str) -> int:
        tool = [sys.executable, *before, str(ROOT / "tools" / "select_heads.py")]
        command = [*tool, "--hf-path", str(folder), "--output", str(output), *ARGUMENTS]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, check=False, env=environment)
        return done.returncode

    whole, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    assert run(whole) == 0
    assert run(resumed, "-c", _KILLED) == -signal.SIGKILL
    assert len(list(tmp_path.glob("resumed.json.work/*/total-*"))) == 1
    assert not resumed.exists()
    assert run(resumed) == 0
    assert resumed.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "resumed.json.work").exists()
