"""Measurements of a run: time by phase, memory, and the scales γ of its heads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_hydra.model.hydra_attention import HydraAttention
from megatron_hydra.parallel import platform
from megatron_hydra.parallel.world import World
from megatron_hydra.reporting import PHASES

T = TypeVar("T")


class PhaseTimers:
    """Seconds that this rank spent in each phase of its steps since the last :meth:`take`.

    The measurement adds no device synchronisation. ``forward_backward`` ends when the host has read the
    gradient norm. The time of the optimizer's kernels after their launch counts in ``forward_backward`` of
    the next step.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def over(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield ``items``, and measure the time to get each of them."""
        iterator = iter(items)
        while True:
            with self.phase(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def take(self) -> list[float]:
        """Return the seconds in the order of :data:`PHASES`, and reset them."""
        seconds = [self._seconds[name] for name in PHASES]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return seconds


def slowest(timers: PhaseTimers) -> dict[str, float]:
    """Seconds of each phase and peak memory, each the maximum over ranks. Collective.

    Returns:
        The phases, ``memory`` and ``reserved`` (bytes; 0 without a GPU).
    """
    memory = (platform.peak_memory_bytes(), platform.peak_reserved_bytes())
    local = [*timers.take(), *map(float, memory)]
    most = torch.tensor(local, dtype=torch.float64, device=platform.device())
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return dict(zip((*PHASES, "memory", "reserved"), most.tolist(), strict=True))


def gamma_by_layer(
    chunks: list[GPTModel], world: World, num_layers: int
) -> dict[str, list[float | None]]:
    """Mean scale γ of the FA and of the GDN heads of every layer. Collective.

    Returns:
        ``gamma_fa`` and ``gamma_gdn``, one number per layer (``None`` if the layer has no such head);
        empty for a model without γ.
    """
    # [layer, branch, (sum, count)]; every head counts once, on one replica and on the rank that holds it.
    totals = torch.zeros(num_layers, 2, 2, dtype=torch.float64, device=platform.device())
    if world.dp_rank == 0 and world.cp_rank == 0:
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                _add_gamma(totals[layer.layer_number - 1], layer.self_attention, world)
    dist.all_reduce(totals)
    if not totals[..., 1].any():
        return {}
    means = [
        [total / count if count else None for total, count in branch]
        for branch in totals.transpose(0, 1).tolist()
    ]
    return {"gamma_fa": means[0], "gamma_gdn": means[1]}


@torch.no_grad()
def _add_gamma(total: torch.Tensor, attention: HydraAttention, world: World) -> None:
    heads, gamma = attention.heads, attention.fusion.gamma
    if gamma is not None:
        for branch, part in ((0, gamma[: len(heads.fa)]), (1, gamma[len(heads.fa) :])):
            count = len(heads.gdn) if branch else len(heads.fa)
            total[branch, 0] += part[:count].double().sum()
            total[branch, 1] += count
    replicated = attention.fusion.fa_gamma
    if replicated is not None and world.tp_rank == 0:
        total[0, 0] += replicated.double().sum()
        total[0, 1] += replicated.numel()
