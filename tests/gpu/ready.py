"""Before the GPU suite starts, check whether it can run here: ``python -m tests.gpu.ready``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

from megatron_hydra.errors import HydraError

NEEDED = (
    "torch", "triton", "megatron.core", "fla", "transformers", "datasets", "safetensors", "yaml", "tqdm",
    "matplotlib", "tensorboard", "psutil", "pytest", "accelerate",
)  # fmt: skip
"""Modules that the suite's commands import, and modules without which other kernels would run."""


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def problem() -> str | None:
    """The missing requirement; ``None``: nothing is missing."""
    missing = [name for name in NEEDED if not _is_there(name)]
    if missing:
        return (
            f"{sys.executable} lacks {', '.join(missing)}: docs/gpu.md lists the wheels; where they are "
            "in a folder of their own, name it in PYTHONPATH"
        )
    try:  # this refuses an unsupported release of Megatron-Core
        importlib.import_module("megatron_hydra.parallel.platform")
    except HydraError as error:
        return str(error)
    if os.environ.get("HYDRA_GPU_DRY_RUN"):
        return None
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU here; HYDRA_GPU_DRY_RUN=2 tries the suite out on the CPU"
    return None


if __name__ == "__main__":
    found = problem()
    if found:
        raise SystemExit(f"error: {found}")
