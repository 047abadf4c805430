"""The processes of one torchrun: run on the first, share work, exchange small results."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_hydra.environment import environment_number, world_size_from_environment
from megatron_hydra.errors import HydraError
from megatron_hydra.stopping import Stopped
from megatron_hydra.watchdog import collective_timeout

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this process writes files: rank 0 under torchrun, or the only process."""
    return environment_number("RANK", 0) == 0


def on_main(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run ``action`` on rank 0 and return its (picklable) result on every rank.

    Args:
        group: all processes, with another back end or timeout; ``None``: the default group.

    Raises:
        HydraError: the error that ``action`` raised, on every rank. No rank waits for a failed one.
    """
    outcome: list = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (HydraError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise HydraError(outcome[1])
    return outcome[0]


class Ranks:
    """The processes of one torchrun, or a single process.

    Args:
        patience: how long a process waits for the others; ``None``: the limit of the active watchdog.

    Attributes:
        rank, size: rank of this process, and number of processes.
        local_rank: rank of this process on its machine.
    """

    def __init__(self, patience: dt.timedelta | None = None) -> None:
        self.rank = environment_number("RANK", 0)
        self.size = world_size_from_environment()
        self.local_rank = environment_number("LOCAL_RANK", 0)
        timeout = patience or collective_timeout()
        self._owns_group = self.size > 1 and not dist.is_initialized()
        if self._owns_group:
            # Ranks exchange only small CPU results, so gloo also works on GPUs.
            dist.init_process_group("gloo", timeout=timeout)
        self._group = None
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def on_first(self, action: Callable[[], T]) -> T:
        """See :func:`on_main`."""
        return action() if self.size == 1 else on_main(action, self._group)

    def raise_together(self, failure: BaseException | None) -> None:
        """Raise on every rank if any has failed; every rank calls it.

        Raises:
            Stopped: a rank was asked to stop.
            HydraError: another rank failed; names it. On the rank itself its own error.
        """
        failures = self.gather(None if failure is None else repr(failure))
        if failure is not None:
            raise failure
        if repr(Stopped()) in failures:
            raise Stopped
        for rank, text in enumerate(failures):
            if text is not None:
                raise HydraError(f"rank {rank} failed: {text}")

    def close(self) -> None:
        """Destroy the process group if this object has made it."""
        if self._owns_group:
            dist.destroy_process_group()
