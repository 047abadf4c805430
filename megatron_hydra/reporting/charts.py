"""Line charts as SVG text, for a page that works offline without other packages."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

Points = Sequence[tuple[float, float | None]]
"""(x, y) in the order of x; a missing y is a gap."""

Place = Callable[[float, float], tuple[float, float]]
"""(x, y) of the data → (x, y) of the picture."""

_WIDTH, _HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 34
_MAX_POINTS = 600
_COLOURS = ("#3b6fb6", "#d1603d", "#3f8f5f", "#8a5fb0", "#b08a2e", "#4aa3a8")


def line_chart(
    title: str,
    lines: dict[str, Points],
    *,
    x_label: str = "step",
    unit: str = "",
    marks: Sequence[float] = (),
) -> str:
    """A ``<figure>`` with one line for each entry.

    Args:
        title: shown above the chart.
        lines: name -> points. Up to six lines have distinct colours; more lines (layers) have a colour
            scale from first to last.
        unit: unit of the y axis.
        marks: x values to mark with a dashed line (restarts).
    """
    seen = {name: points for name, points in lines.items() if any(y is not None for _, y in points)}
    thinned = {name: _thin(points) for name, points in seen.items()}
    xs = [x for points in thinned.values() for x, y in points if y is not None]
    ys = [y for points in thinned.values() for _, y in points if y is not None]
    if not ys:
        return ""
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = [_axes(x_ticks, y_ticks, x_label, place, (x_low, x_high), (y_low, y_high))]
    for mark in marks:
        if x_low <= mark <= x_high:
            x, _ = place(mark, y_low)
            parts.append(f'<path class="mark" d="M{x} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
    colours = _colours(len(thinned))
    for colour, (name, points) in zip(colours, thinned.items(), strict=True):
        parts.append(
            f'<path class="line" stroke="{colour}" d="{_path(points, place)}">'
            f"<title>{html.escape(name)}</title></path>"
        )
    label = f"{title} [{unit}]" if unit else title
    return (
        f"<figure><figcaption>{html.escape(label)}{_legend(list(thinned), colours)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _thin(points: Points) -> list[tuple[float, float | None]]:
    """At most :data:`_MAX_POINTS` points: the minimum and the maximum of every interval."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (_MAX_POINTS // 2))
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        stretch = [(x, y) for x, y in points[start : start + size] if y is not None]
        if not stretch:
            kept.append(points[start])
            continue
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers around a range."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first = math.floor(low / step)
    return [i * step for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    place: Place,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> str:
    parts = []
    for tick in y_ticks:
        if y_range[0] <= tick <= y_range[1]:
            _, y = place(x_range[0], tick)
            parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
            parts.append(
                f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{_number(tick)}</text>'
            )
    for tick in x_ticks:
        if x_range[0] <= tick <= x_range[1]:
            x, _ = place(tick, y_range[0])
            parts.append(
                f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">'
                f"{_number(tick)}</text>"
            )
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">'
        f"{html.escape(x_label)}</text>"
    )
    return "".join(parts)


def _number(value: float) -> str:
    size = abs(value)
    if size and (size >= 1e6 or size < 1e-3):
        return f"{value:.3g}"
    return f"{value:,.6g}"


def _path(points: Sequence[tuple[float, float | None]], place: Place) -> str:
    words, pen_down = [], False
    for i, (x, y) in enumerate(points):
        if y is None:
            pen_down = False
            continue
        px, py = place(x, y)
        words.append(f"{'L' if pen_down else 'M'}{px} {py}")
        alone = not pen_down and (i + 1 == len(points) or points[i + 1][1] is None)
        if alone:  # a point without neighbours would be invisible
            words.append("h.01")
        pen_down = True
    return "".join(words)


def _colours(count: int) -> list[str]:
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    return [f"hsl({round(260 - 220 * i / (count - 1))} 55% 50%)" for i in range(count)]


def _legend(names: list[str], colours: list[str]) -> str:
    if len(names) == 1:
        return ""
    pairs = list(zip(names, colours, strict=True))
    if len(pairs) > len(_COLOURS):
        pairs = [pairs[0], pairs[-1]]
    return "".join(
        f' <span class="key" style="color:{colour}">{html.escape(name)}</span>'
        for name, colour in pairs
    )
