"""The process group, Megatron's parallel state, and seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from megatron_hydra.config.run import RunConfig
from megatron_hydra.environment import environment_number
from megatron_hydra.ops.determinism import make_deterministic
from megatron_hydra.parallel import platform
from megatron_hydra.watchdog import PATIENCE, collective_timeout

from megatron.core import parallel_state, tensor_parallel  # isort: skip  (after the platform)


_owned_process_group = False


@dataclasses.dataclass(frozen=True)
class World:
    """This process's ranks in Megatron-Core's groups, and the sizes of these groups."""

    rank: int
    size: int
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    sequence_parallel: bool

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the last model chunk."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the first model chunk."""
        return self.pp_rank == 0


def start_world(config: RunConfig) -> World:
    """Join the process group, build Megatron's groups and seed all generators.

    It works under torchrun and, with one process, under plain ``python -m``.

    Raises:
        HydraError: ``deterministic`` is not possible here.
    """
    platform.install()
    if config.deterministic:
        make_deterministic()  # must be before NCCL reads its environment
    timeout = collective_timeout(config.faults.timeout_seconds)
    platform.bind_process_to_device(environment_number("LOCAL_RANK", 0))
    global _owned_process_group
    _owned_process_group = not dist.is_initialized()
    if _owned_process_group:
        backend = platform.communication_backend()
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
    _build_groups(config)
    return _place(config)


@contextlib.contextmanager
def rehearsed_world(config: RunConfig, rank: int) -> Iterator[World]:
    """The world of one rank of a run in a single process: collectives return at once and transfer nothing.

    It allows a call of a layer under a layout on one device, if only shapes matter. Values differ from the
    run's. No process group may exist.

    Args:
        config: the run; only its tensor and context parallelism are used.
        rank: index among ``parallel.tensor · parallel.context`` ranks; tensor-parallel ranks are neighbours.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    parallel = config.parallel
    size = parallel.tensor * parallel.context * parallel.pipeline
    platform.install()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        _build_groups(config, with_gloo=False)
        yield _place(config)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _build_groups(config: RunConfig, with_gloo: bool = True) -> None:
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=math.ceil(PATIENCE * config.faults.timeout_seconds / 60),
        create_gloo_process_groups=with_gloo,
    )
    _seed(config)


def _place(config: RunConfig) -> World:
    parallel = config.parallel
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tensor,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel.context,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel.pipeline,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        sequence_parallel=parallel.sequence,
    )


def _seed(config: RunConfig) -> None:
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed)


def stop_world() -> None:
    """Undo :func:`start_world`; a process group that existed before it stays."""
    parallel_state.destroy_model_parallel()
    if _owned_process_group and dist.is_initialized():
        dist.destroy_process_group()
