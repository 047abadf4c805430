"""Shared by all tests: Megatron's groups of one rank; GPU tests are skipped on machines without a GPU.

``HYDRA_GPU_DRY_RUN=N`` runs the tests of tests/gpu on the CPU, as on a machine with N GPUs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

# transformers copies the code of exports to this folder. Processes that share it disturb each other.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Megatron's groups of one rank, for modules that build models in this process.

    They are removed at the module's end: the next module may start its own world in the same worker.
    """
    from megatron_hydra.parallel import platform

    platform.install()
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` on a machine without a CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        played = os.environ.get("HYDRA_GPU_DRY_RUN")
        for item in gpu_items:
            if not (played and item.path.parent.name == "gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/test_fuzzing.py."""
    parser.addoption(
        "--fuzz-seconds", type=float, default=0.0, help="go on with other inputs for so long"
    )
    parser.addoption("--fuzz-seed", type=int, default=0, help="number of the first input")
