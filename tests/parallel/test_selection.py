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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen3").save_pretrained(folder)
    return folder


def _select(folder: Path, output: Path, *before: str) -> int:
    """The command in one process; ``before``: what the interpreter runs in the script's stead."""
    tool = [sys.executable, *before, str(ROOT / "tools" / "select_heads.py")]
    command = [*tool, "--hf-path", str(folder), "--output", str(output), *ARGUMENTS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, check=False, env=environment).returncode


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The map of one process that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "map.json"
    assert _select(folder, output) == 0
    return output.read_bytes()


def test_three_ranks_write_the_map_of_one(folder: Path, whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "3.json"
    paths = ["--hf-path", str(folder), "--output", str(output)]
    torchrun("tools.select_heads", 3, *paths, *ARGUMENTS)
    assert output.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [output]


# Killed by itself, right after its first receivers' effects lie on disk: from outside the moment is missed
# on a busy machine.
_KILLED = """
import os, runpy, signal, sys
from megatron_hydra.selection.work import WorkBench

write = WorkBench._write

def write_and_die(self, chunk, result):
    write(self, chunk, result)
    if chunk.key.startswith("receivers"):
        os.kill(os.getpid(), signal.SIGKILL)

WorkBench._write = write_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_that_was_killed_resumes_to_the_same_map(
    folder: Path, whole: bytes, tmp_path: Path
) -> None:
    resumed = tmp_path / "resumed.json"
    assert _select(folder, resumed, "-c", _KILLED) == -signal.SIGKILL
    assert len(list(tmp_path.glob("resumed.json.work/*/receivers*"))) == 1
    assert not resumed.exists()
    assert _select(folder, resumed) == 0
    assert resumed.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [resumed]
