"""Charts: gaps stay, thinning keeps extremes, and names cannot inject HTML."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from megatron_hydra.reporting.charts import _thin, _ticks, line_chart


def _lines(figure: str) -> list[str]:
    return re.findall(r'class="line"[^>]* d="([^"]*)"', figure)


def test_a_chart_is_well_formed_and_has_its_lines() -> None:
    figure = line_chart("a <b> & c", {"x": [(1, 2.0), (2, 3.0)], "y": [(1, 0.5)]}, unit="s")
    root = ET.fromstring(figure)
    assert root.find("svg").get("aria-label") == "a <b> & c [s]"
    assert len(_lines(figure)) == 2


def test_a_missing_value_is_a_gap_and_a_lone_point_is_seen() -> None:
    (path,) = _lines(line_chart("t", {"x": [(1, 1.0), (2, None), (3, 2.0), (4, 1.5)]}))
    assert path.count("M") == 2
    assert path.count("L") == 1
    assert "h.01" in path.split("M")[1]


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("t", {}) == ""
    assert line_chart("t", {"x": [(1, None)]}) == ""


def test_constant_and_single_values_have_a_scale() -> None:
    for points in ([(1, 0.0)], [(5, 3.0), (6, 3.0)], [(0, -1e-9), (1, 1e9)]):
        for path in _lines(line_chart("t", {"x": points})):
            numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.replace("h.01", ""))]
            assert all(0 <= n <= 560 for n in numbers)


def test_thinning_keeps_the_extremes() -> None:
    points = [(x, float(x % 7)) for x in range(10_000)]
    points[4321] = (4321, 99.0)
    points[8765] = (8765, -5.0)
    thinned = _thin(points)
    assert len(thinned) <= 600
    assert (4321, 99.0) in thinned
    assert (8765, -5.0) in thinned
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)


@pytest.mark.parametrize("low_high", [(0, 1), (3.2, 3.3), (-7, 1e6), (5, 5), (0, 0)])
def test_ticks_surround_the_range(low_high: tuple[float, float]) -> None:
    low, high = low_high
    ticks = _ticks(low, high)
    assert 1 <= len(ticks) <= 9
    assert ticks[0] <= low
    assert ticks[-1] >= high - 1e-9 * max(1.0, abs(high))


def test_marks_outside_the_range_are_left_out() -> None:
    figure = line_chart("t", {"x": [(10, 1.0), (20, 2.0)]}, marks=[5, 15])
    assert figure.count('class="mark"') == 1


def test_many_lines_share_a_scale_and_a_short_legend() -> None:
    lines = {f"layer {i}": [(0, float(i)), (1, float(i))] for i in range(28)}
    figure = line_chart("t", lines)
    assert len(_lines(figure)) == 28
    assert figure.count('class="key"') == 2
    assert len(set(re.findall(r'stroke="([^"]*)"', figure))) > 20
