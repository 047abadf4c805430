"""Run a module in several CPU processes on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks._processes import Family

ROOT = Path(__file__).resolve().parents[2]


def torchrun(module: str, processes: int, *arguments: str, timeout: float = 600) -> str:
    """Run ``python -m module`` in ``processes`` ranks; returns their output, or raises it as AssertionError."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return _output([*launcher, module, *arguments], timeout)


def forked(
    module: str,
    processes: int,
    *arguments: str,
    timeout: float = 600,
    python: str = sys.executable,
) -> str:
    """As :func:`torchrun`, with one import for all ranks; for modules that do not test torchrun itself."""
    return _output(["tests.parallel.forked", str(processes), module, *arguments], timeout, python)


def _output(words: list[str], timeout: float, python: str = sys.executable) -> str:
    command = [python, "-m", *words]
    family = Family(
        command,
        os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process = family.process
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException:  # our timeout or pytest's, or Ctrl-C
        family.kill()  # also ends the ranks, which would otherwise run for ever
        process.communicate()
        raise
    assert process.returncode == 0, f"{' '.join(command)}\n{output[-4000:]}\n{errors[-6000:]}"
    return output
