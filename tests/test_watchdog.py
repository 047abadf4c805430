"""The watchdog: its feeders, and the timeouts of process groups."""

from __future__ import annotations

import datetime as dt
import faulthandler

import pytest
import torch

from megatron_hydra.ranks import Ranks
from megatron_hydra.selection.time_left import Stage
from megatron_hydra.selection.work import Chunk, WorkBench
from megatron_hydra.watchdog import PATIENCE, Watchdog, collective_timeout, feed_watchdog


@pytest.fixture
def meals(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The seconds that each feeding allows; ``None`` for the end of the watch."""
    found: list[float | None] = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda seconds, **_: found.append(seconds)
    )
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: found.append(None))
    return found


def test_only_an_active_watchdog_is_fed(meals: list[float | None]) -> None:
    feed_watchdog()
    with Watchdog(10):
        feed_watchdog(2)
    feed_watchdog()
    assert meals == [PATIENCE * 10, 20, None]


def test_every_chunk_of_a_selection_feeds_it(meals: list[float | None]) -> None:
    chunks = [Chunk(str(i), 1.0, batch=i) for i in range(3)]

    def compute(_, members):
        for chunk in members:
            meals.append(0)
            yield chunk, {"x": torch.zeros(1)}

    with Watchdog(10):
        WorkBench(Ranks()).run(Stage("stage", "task"), chunks, compute)
    # Before the first chunk and after each chunk; other chunks may be slower.
    assert meals == [50, 10, 0, 10, 0, 10, 0, 10, 50, None]


def test_the_timeout_of_a_group_is_not_shorter_than_the_watchdogs() -> None:
    assert collective_timeout() is None
    with Watchdog(60):
        assert collective_timeout() == dt.timedelta(seconds=PATIENCE * 60)
    assert collective_timeout(7) == dt.timedelta(seconds=PATIENCE * 7)
