"""A map depends neither on the number of ranks nor on a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.launch import ROOT
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


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all runs of tests/parallel/selection_runs.py."""
    outputs = tmp_path_factory.mktemp("maps")
    command = [sys.executable, "-m", "tests.parallel.selection_runs", str(outputs)]
    done = subprocess.run(
        [*command, "--hf-path", str(folder), *ARGUMENTS],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    statuses = json.loads(done.stdout.splitlines()[-1])
    killed = 128 + signal.SIGKILL
    assert statuses == {"whole": 0, "three": 0, "killed": killed, "resumed": 0}, done.stderr[-6000:]
    return outputs


def test_three_ranks_write_the_map_of_one(runs: Path) -> None:
    assert (runs / "three/map.json").read_bytes() == (runs / "whole/map.json").read_bytes()
    assert list((runs / "three").iterdir()) == [runs / "three/map.json"]


def test_a_run_that_was_killed_resumes_to_the_same_map(runs: Path) -> None:
    left = json.loads((runs / "left.json").read_text())
    assert "map.json" not in left
    assert len([path for path in left if "/receivers" in path]) == 1
    assert (runs / "killed/map.json").read_bytes() == (runs / "whole/map.json").read_bytes()
    assert list((runs / "killed").iterdir()) == [runs / "killed/map.json"]
