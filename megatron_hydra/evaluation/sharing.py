"""Share the cells of an evaluation among processes, each with a whole Hugging Face model on its own GPU."""

from __future__ import annotations

import datetime as dt
import heapq
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from megatron_hydra.ranks import Ranks
from megatron_hydra.stopping import Stopped

Item = TypeVar("Item")

PATIENCE = dt.timedelta(days=2)
"""A process without further cells waits for the others, whose cells may take hours."""


def deal(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Indices for each process: the most expensive first, always to the process with the least work."""
    loads = [(0.0, process) for process in range(processes)]
    dealt: list[list[int]] = [[] for _ in loads]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, process = heapq.heappop(loads)
        dealt[process].append(index)
        heapq.heappush(loads, (load + costs[index], process))
    return dealt


def compute_shared(
    ranks: Ranks,
    items: Sequence[Item],
    costs: Sequence[float],
    compute: Callable[[Item], Any],
) -> list[Any]:
    """``compute(item)`` for every item, each on one rank; all results on every rank, in order.

    Args:
        costs: of the items, in any unit.
        compute: its result must be picklable.

    Raises:
        HydraError: an item failed on another rank; on the rank itself its own error.
    """
    found: dict[int, Any] = {}
    failure: BaseException | None = None
    try:
        for index in deal(costs, ranks.size)[ranks.rank]:
            found[index] = compute(items[index])
    except (Exception, Stopped) as error:  # the other ranks must know, or they wait forever
        failure = error
    ranks.raise_together(failure)
    whole: dict[int, Any] = {}
    for part in ranks.gather(found):
        whole |= part
    return [whole[index] for index in range(len(items))]
