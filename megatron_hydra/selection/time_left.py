"""How long the work that is left will take, from what was computed so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple


class Stage(NamedTuple):
    """One kind of work on one task.

    Attributes:
        kind: ``baseline``, ``direct``, ``total``, … ; units of one kind take time in proportion to
            their cost. Kinds that differ in a number at the end, ``senders_2``, have one pace.
        task: the task's name.
    """

    kind: str
    task: str

    def __str__(self) -> str:
        return f"{self.kind} {self.task}"


@dataclasses.dataclass
class _Pace:
    """What units of one kind took; the first one counts only until there is a second.

    The first call of anything pays for what is made once: memory, threads, compiled kernels.
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
    """The time left, and how much of the whole is done.

    Every kind of work has its own pace, since a backward or a small product does fewer operations a
    second than a large product. A kind that has not been seen yet goes at the pace of all others together.
    Means over everything seen are taken, not over the last few units: units of one stage differ in size.

    Args:
        processes: that share the work; one pace stands for all of them.
    """

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes
        self.spent = 0.0
        self._left: dict[Stage, float] = {}
        self._paces: dict[str, _Pace] = {}

    def plan(self, stage: Stage, cost: float) -> None:
        """Say what is left to do of a stage by all processes; again whenever more is known."""
        self._left[stage] = cost

    def cost(self, stage: Stage) -> float:
        """What is left of a stage, as far as it was planned."""
        return self._left.get(stage, 0.0)

    def drop(self, task: str, kind: str = "") -> None:
        """Nothing more will be done for a task, or nothing more of one kind."""
        self._left = {
            stage: cost
            for stage, cost in self._left.items()
            if stage.task != task or (kind and stage.kind != kind)
        }

    def observe(self, kind: str, cost: float, seconds: float) -> None:
        """A unit was timed on this process. Units without cost say nothing and are passed over."""
        self.spent += seconds
        if cost > 0:
            self._paces.setdefault(_work(kind), _Pace()).add(cost, seconds)

    def done(self, stage: Stage, cost: float, seconds: float) -> None:
        """A planned unit was computed here, and so many like it by the other processes."""
        self.observe(stage.kind, cost, seconds)
        self._left[stage] = max(0.0, self._left.get(stage, 0.0) - cost * self.processes)

    @property
    def stages(self) -> list[Stage]:
        """What was planned."""
        return list(self._left)

    def seconds(
        self,
        kinds: tuple[str, ...] = (),
        task: str = "",
        tasks: Callable[[str], bool] = lambda _: True,
    ) -> float | None:
        """Seconds left; ``None`` as long as nothing was timed.

        Args:
            kinds: of these kinds only.
            task: of this task only.
            tasks: of the tasks that it is true of.
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
        """Time spent as a share of all the time that will have been spent, 0 … 1."""
        left = self.seconds()
        return 0.0 if left is None else self.spent / max(self.spent + left, 1e-9)

    def _pace(self, kind: str) -> float:
        """Seconds for a unit of cost."""
        seen = self._paces.get(_work(kind))
        paces = [seen] if seen is not None else list(self._paces.values())
        return sum(p.seconds for p in paces) / sum(p.cost for p in paces)


def _work(kind: str) -> str:
    """What a kind of work does, whichever time."""
    name, _, number = kind.rpartition("_")
    return name if number.isdecimal() else kind


def in_words(seconds: float) -> str:
    """A time as people say it: ``40 s``, ``12 min``, ``3 h 10 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(round(minutes / 10) * 10, 60)
    return f"{hours} h" + (f" {rest} min" if rest else "")
