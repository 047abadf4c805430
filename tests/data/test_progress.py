"""Progress lines: they count tokens, start at the first unit, and fit any duration."""

from __future__ import annotations

import types

import numpy as np
import pytest

from megatron_hydra.data import progress as module
from megatron_hydra.data.corpus import Unit
from megatron_hydra.data.parts import Assembler
from megatron_hydra.data.progress import Progress, _clock


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """The last line of a preparation of 100 equal units after ``seconds``."""
    assembler = Assembler(tmp_path, np.uint16, has_modes=False)
    units = [Unit("x", "stream", i, 100, 1) for i in range(100)]
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    shown: list[str] = []
    progress: list[Progress] = []

    def line(seconds: float, parts: int, tokens: int, in_work: int = 0, max_tokens: int = 0) -> str:
        if not progress:
            progress.append(Progress(units, assembler, max_tokens, shown.append))
        assembler.state.parts, assembler.state.counts.tokens = parts, tokens
        (tmp_path / f"part-{parts:08d}.tmp-7").write_bytes(bytes(2 * in_work))
        clock.now = seconds
        progress[0].show()
        return shown[-1] if shown else ""

    yield line
    assembler.close()


def test_share_and_time_left(lines):
    assert lines(1, 10, 1_000) == ""  # only some parts have a line
    assert lines(10, 10, 1_000).startswith(" 10.0%")
    assert lines(20, 25, 2_500).endswith("00:01:00 left")
    assert "2,500 tokens  125 tokens/s" in lines(20.1, 25, 2_500)


def test_more_than_a_day_left_is_not_less(lines):
    assert lines(3_600, 1, 1_000).endswith("99:00:00 left")


def test_a_token_limit_is_the_end(lines):
    line = lines(10, 0, 0, in_work=250, max_tokens=1_000)
    assert line.startswith(" 25.0%  250 tokens  25 tokens/s")
    assert line.endswith("00:00:30 left")
    assert lines(20, 10, 500).startswith(" 50.0%")  # although it is a tenth of the corpus


def test_parts_in_work_count_and_finished_ones_count_once(lines, tmp_path):
    assert lines(10, 0, 0, in_work=500).startswith("     ?  500 tokens  50 tokens/s")
    (tmp_path / "part-00000000.bin").write_bytes(bytes(1_000))  # joined, not yet deleted
    (tmp_path / "part-00000002.bin").write_bytes(bytes(200))  # made in advance
    assert lines(20, 1, 500, in_work=100).startswith("  1.4%  700 tokens  35 tokens/s")


def test_hours_are_not_cut():
    assert [_clock(s) for s in (0, 59.6, 3_661, 90_000)] == [
        "00:00:00",
        "00:01:00",
        "01:01:01",
        "25:00:00",
    ]
