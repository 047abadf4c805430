"""Estimate the time of the remaining work from the work done so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple


class Stage(NamedTuple):
    """One kind of work on one task.

    Attributes:
        kind: ``baseline``, ``direct``, ``total``, … The time of units of one kind is proportional to their
            cost. Kinds that differ only in a number at the end, such as ``senders_2``, share one pace.
        task: the task's name.
    """

    kind: str
    task: str

    def __str__(self) -> str:
        return f"{self.kind} {self.task}"


@dataclasses.dataclass
class _Pace:
    """Times of units of one kind. The first unit counts only until the second.

    The first call has one-time costs: memory, threads, compiled kernels.
    """

    cost: float = 0.0
    seconds: float = 0.0
    units: int = 0

    def add(self, cost: float, seconds: float) -> None:
        if self.units == 1:
            self.cost, self.seconds = 0.0, 0.0
        self.cost += cost
        self.seconds += seconds
        self.units += 1


class TimeLeft:
    """Estimates the time left and the share of the work done.

    Every kind of work has its own pace, because a backward or a small product does fewer operations per second
    than a large product. A kind without a timing uses the pace of all others together. Means are taken over all
    units, not over the last few, because the units of a stage differ in size.

    Args:
        processes: number of processes that share the work; all have the same pace.
    """

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes
        self.spent = 0.0
        self._left: dict[Stage, float] = {}
        self._paces: dict[str, _Pace] = {}

    def plan(self, stage: Stage, cost: float) -> None:
        """Set the remaining work of a stage for all processes. Call it again when it changes."""
        self._left[stage] = cost

    def cost(self, stage: Stage) -> float:
        """Remaining planned cost of a stage."""
        return self._left.get(stage, 0.0)

    def drop(self, task: str, kind: str = "") -> None:
        """Remove the remaining work of a task, or of one kind."""
        self._left = {
            stage: cost
            for stage, cost in self._left.items()
            if stage.task != task or (kind and stage.kind != kind)
        }

    def observe(self, kind: str, cost: float, seconds: float) -> None:
        """Record the time of a unit on this process. Units without cost are ignored."""
        self.spent += seconds
        if cost > 0:
            self._paces.setdefault(_work(kind), _Pace()).add(cost, seconds)

    def done(self, stage: Stage, cost: float, seconds: float) -> None:
        """Record a planned unit done here; the other processes have done the same amount."""
        self.observe(stage.kind, cost, seconds)
        self._left[stage] = max(0.0, self._left.get(stage, 0.0) - cost * self.processes)

    @property
    def stages(self) -> list[Stage]:
        """The planned stages."""
        return list(self._left)

    def seconds(
        self,
        kinds: tuple[str, ...] = (),
        task: str = "",
        tasks: Callable[[str], bool] = lambda _: True,
    ) -> float | None:
        """Seconds left; ``None`` before the first timing.

        Args:
            kinds: only these kinds.
            task: only this task.
            tasks: only tasks for which this function is true.
        """
        if not self._paces:
            return None
        return sum(
            cost / self.processes * self._pace(stage.kind)
            for stage, cost in self._left.items()
            if (not kinds or stage.kind in kinds)
            and (not task or stage.task == task)
            and tasks(stage.task)
        )

    @property
    def share_done(self) -> float:
        """Time spent as a share of the total time, 0 … 1."""
        left = self.seconds()
        return 0.0 if left is None else self.spent / max(self.spent + left, 1e-9)

    def _pace(self, kind: str) -> float:
        """Seconds per unit of cost."""
        seen = self._paces.get(_work(kind))
        paces = [seen] if seen is not None else list(self._paces.values())
        return sum(p.seconds for p in paces) / sum(p.cost for p in paces)


def _work(kind: str) -> str:
    """A kind of work without the number of its round."""
    name, _, number = kind.rpartition("_")
    return name if number.isdecimal() else kind


def in_words(seconds: float) -> str:
    """A time as text: ``40 s``, ``12 min``, ``3 h 10 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(round(minutes / 10) * 10, 60)
    return f"{hours} h" + (f" {rest} min" if rest else "")
