"""Other hybrids, for rows of the paper's table: tiny random models of Qwen3.5 and Qwen3-Next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KV = 2 * 2 * 8 * 4  # one layer of four: keys and values of two heads of eight channels, fp32
STATE = (
    3 * (4 * 8 * 8 + (2 * 2 * 8 + 4 * 8) * 4) * 4
)  # three layers: states, four columns of q, k, v


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_next"])
def test_a_foreign_hybrid_is_scored(kind, tmp_path):
    """A padded batch scores as single prompts do: every expected answer is the model's own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.evaluation.foreign_hybrid", kind, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    cell = results["tasks"]["ids"]["80"]
    assert cell["samples"] == 5 and cell["accuracy"] == 1.0
    assert results["cache"] == {"kv_bytes_per_token": KV, "state_bytes": STATE}
