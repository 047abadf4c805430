"""Run an action on all ranks; an error on one rank is raised on all ranks. Flags that all ranks agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_hydra.errors import HydraError
from megatron_hydra.parallel import platform

T = TypeVar("T")


def on_all(action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; if it fails on one rank, it raises on all ranks.

    For actions without collectives inside (or whose collectives fail together).

    Raises:
        HydraError: names the first rank that failed, and the reason.
    """
    result, message = None, ""
    try:
        result = action()
    except (HydraError, OSError) as error:
        message = str(error)
    messages: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for rank, text in enumerate(messages):
        if text:
            raise HydraError(text if rank == dist.get_rank() else f"rank {rank}: {text}")
    return result  # type: ignore[return-value]


def true_everywhere(flag: bool) -> bool:
    """Whether the flag is true on every rank. Collective."""
    return _agreed(flag, dist.ReduceOp.MIN)


def true_anywhere(flag: bool) -> bool:
    """Whether the flag is true on any rank. Collective."""
    return _agreed(flag, dist.ReduceOp.MAX)


def _agreed(flag: bool, how: dist.ReduceOp.RedOpType) -> bool:
    tensor = torch.tensor(int(flag), device=platform.device())
    dist.all_reduce(tensor, how)
    return bool(tensor.item())
