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
    done = subprocess.run(  # noqa: PLW1510
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, (
        f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    )
    return done.stdout
