"""Run a module under torchrun on this machine, as many CPU processes as asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def torchrun(module: str, processes: int, *arguments: str, timeout: float = 600) -> str:
    """Run ``python -m module`` in ``processes`` ranks; their output, or an AssertionError with it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={processes}", "-m", module, *arguments,
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException:  # a timeout of ours or of pytest, or Ctrl-C
        process.terminate()  # not killed: torchrun then ends its ranks, which would run on for ever
        process.communicate()
        raise
    assert process.returncode == 0, f"{' '.join(command)}\n{output[-4000:]}\n{errors[-6000:]}"
    return output
