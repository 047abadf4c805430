"""Triton kernels in a process without a GPU: interpreted, or compiled for the GPU of another machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hydra.ops.packages import is_installed

ROOT = Path(__file__).resolve().parents[1]

needs_triton = pytest.mark.skipif(not is_installed("triton"), reason="needs triton")


def output_lines(module: str, *arguments: str, interpreted: bool, timeout: float) -> list[str]:
    """The lines that a module prints. It runs in a new process, because Triton reads its variable at import."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    else:  # the interpreter accepts some code that the compiler refuses
        environment.pop("TRITON_INTERPRET", None)
        environment["PYTHONWARNINGS"] = "ignore"
    result = subprocess.run(  # noqa: PLW1510
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()
