"""One process, one rank: Megatron's groups for tests that build models in this process."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_rank():
    from megatron_hydra.parallel import platform

    platform.install()
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    started_here = not dist.is_initialized()
    if started_here:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    if started_here:
        dist.destroy_process_group()
