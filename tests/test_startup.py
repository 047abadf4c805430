"""The parts of the time to the first step add up, and a nested part counts once."""

from __future__ import annotations

import time

import pytest

from megatron_hydra import startup
from megatron_hydra.startup import StartupClock, in_words, startup_phase


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that tests move forward."""
    now = [time.time() + 100.0]
    monkeypatch.setattr(startup.time, "time", lambda: now[0])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return now


def test_parts_add_up_to_the_whole(clock: list[float]) -> None:
    startup.process_is_one_run()
    with StartupClock() as start:
        clock[0] += 1
        with startup_phase("model"):
            clock[0] += 2
            with startup_phase("check"):
                clock[0] += 4
            clock[0] += 8
        with startup_phase("model"):
            clock[0] += 16
        seconds = start.seconds()
        assert {name: seconds[name] for name in ("other", "model", "check")} == {
            "other": 1, "model": 26, "check": 4,
        }  # fmt: skip
        assert seconds["imports"] > 99  # from the start of the process
        assert sum(seconds.values()) == pytest.approx(start.total(), abs=0.01)


def test_the_launcher_counts_under_torchrun(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    startup.process_is_one_run()
    start = StartupClock()
    assert start.seconds()["launcher"] >= 0
    assert sum(start.seconds().values()) == pytest.approx(start.total(), abs=0.01)


def test_a_second_run_of_a_process_does_not_count_the_first(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    startup.process_is_one_run()
    assert StartupClock().total() > 99
    with StartupClock() as again:
        clock[0] += 2
        with startup_phase("model"):
            clock[0] += 3
        assert again.seconds() == {"other": 2, "model": 3}
        assert again.total() == 5


def test_without_a_clock_nothing_is_measured() -> None:
    with startup_phase("model"):
        pass
    assert not startup._running


def test_the_line_leaves_out_what_took_no_time() -> None:
    assert in_words({"imports": 2.0, "data": 0.01, "model": 3.06}) == "model 3.1 s, imports 2.0 s"
