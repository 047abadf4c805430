"""Pictures of an experiment: accuracy against length, a grid of all rows, bars, losses against tokens."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from megatron_hydra.experiments import scaling
from megatron_hydra.experiments.results import Results, length_name, split_column
from megatron_hydra.files import write_figure_atomic

_MARKERS = "os^Dv<>Pp*hX"


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw the available results.

    Returns:
        ``<name>_<task>.png`` (mean and range over seeds against length) for every task with several lengths,
        ``<name>_grid.png`` (these tasks side by side, a row for each variant), ``<name>_bars.png``,
        ``<name>_losses.png`` if a stage has metrics, and ``<name>_fit.png`` if the table has rows to fit.
    """
    parts = [split_column(column) for column in results.columns()]
    columns = [(task, length) for task, length in parts if length is not None]
    paths = []
    name = results.experiment.name
    lengths: dict[str, list[int]] = {}
    for task, length in columns:
        lengths.setdefault(task, []).append(length)
    several = {task: found for task, found in lengths.items() if len(found) > 1}
    for task, its_lengths in several.items():
        paths.append(_lengths(results, task, its_lengths, folder / f"{name}_{task}.png"))
    if several:
        paths.append(_grid(results, several, folder / f"{name}_grid.png"))
    # Columns that the table leaves out may exist for some rows only.
    chosen = results.experiment.table.columns
    shown = [(task, n) for task, n in columns if not chosen or f"{task}@{n}" in chosen]
    if shown:
        paths.append(_bars(results, shown, folder / f"{name}_bars.png"))
    if any(curve for cell in results.cells for curve in cell.training.values()):
        paths.append(_losses(results, folder / f"{name}_losses.png"))
    if results.experiment.table.fit_rows and (found := scaling.fits(results)):
        paths.append(_fits(results, found, folder / f"{name}_fit.png"))
    return paths


def _lengths(results: Results, task: str, lengths: list[int], path: Path) -> Path:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    variants = results.experiment.variants
    colors = colormaps["tab10" if len(variants) <= 10 else "tab20"]
    for number, variant in enumerate(variants):
        spreads = [results.spread(variant, f"{task}@{n}") for n in lengths]
        there = [(n, s) for n, s in zip(lengths, spreads, strict=True) if s is not None]
        if not there:
            continue
        x = [n for n, _ in there]
        color = colors(number % colors.N)
        axes.plot(
            x,
            [s.mean for _, s in there],
            marker=_MARKERS[number % len(_MARKERS)],
            color=color,
            label=variant,
        )
        axes.fill_between(
            x,
            [min(s.values.values()) for _, s in there],
            [max(s.values.values()) for _, s in there],
            color=color,
            alpha=0.12,
            linewidth=0,
        )
    if native := results.experiment.table.train_length:
        axes.axvline(native, color="#5f6368", linestyle=":")
        if max(lengths) > native:
            axes.axvspan(native, max(lengths) * 1.1, color="#5f6368", alpha=0.06, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.set(xlabel="context length (tokens)", ylabel="right answers")
    _title(figure, results, f": {task}", seeds="; mean and range over seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return write_figure_atomic(figure, path, dpi=120)


def _grid(results: Results, lengths: dict[str, list[int]], path: Path) -> Path:
    """One panel for each task: a row for each variant, a column for each length, the mean over seeds.

    Lines of many rows hide each other where all answers are right, or all wrong; cells do not.
    """
    from matplotlib.figure import Figure

    variants = results.experiment.variants
    widths = [len(found) for found in lengths.values()]
    figure = Figure(
        figsize=(0.5 * sum(widths) + 3.2, 0.32 * len(variants) + 1.3), layout="constrained"
    )
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False, width_ratios=widths)[0]
    native = results.experiment.table.train_length
    marked = [task for task, found in lengths.items() if native and max(found) > native]
    for (task, found), axes in zip(lengths.items(), panels, strict=True):
        means = []
        for variant in variants:
            spreads = [results.spread(variant, f"{task}@{n}") for n in found]
            means.append([math.nan if s is None else s.mean for s in spreads])
        axes.imshow(means, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row, values in enumerate(means):
            for column, value in enumerate(values):
                text = "–" if math.isnan(value) else f"{value:.2f}"
                color = "white" if value > 0.6 else "#202124"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
        if task in marked:
            axes.axvline(sum(n <= native for n in found) - 0.5, color="#d93025", linewidth=1.5)
        axes.set_xticks(range(len(found)), [length_name(n) for n in found], fontsize=8)
        axes.set_yticks(range(len(variants)), variants, fontsize=8)
        axes.set_title(task, fontsize=9)
        axes.tick_params(length=0)
    figure.supxlabel(
        "context length (tokens)" + ("; red line: the teacher's own length" if marked else ""),
        fontsize=8,
    )
    _title(figure, results, ": right answers", seeds="; mean over seeds")
    return write_figure_atomic(figure, path, dpi=120)


def _bars(results: Results, columns: list[tuple[str, int]], path: Path) -> Path:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    lengths = sorted({n for _, n in columns})
    wanted = results.experiment.table.bars or tuple(sorted({lengths[0], lengths[-1]}))
    shown = [(task, n) for task, n in columns if n in wanted]
    variants = results.experiment.variants
    figure = Figure(figsize=(max(6.0, 1.1 * len(shown) + 3), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(variants)
    colors = colormaps["tab10" if len(variants) <= 10 else "tab20"]
    for number, variant in enumerate(variants):
        label: str | None = variant  # label of its first bar, at any position
        for place, (task, length) in enumerate(shown):
            spread = results.spread(variant, f"{task}@{length}")
            if spread is None:
                continue
            low, high = min(spread.values.values()), max(spread.values.values())
            axes.bar(
                place + (number - (len(variants) - 1) / 2) * width,
                spread.mean,
                width,
                color=colors(number % colors.N),
                label=label,
                yerr=[[spread.mean - low], [high - spread.mean]],
                error_kw={"linewidth": 0.8},
            )
            label = None
    axes.set_xticks(range(len(shown)), [f"{task}\n{n}" for task, n in shown], fontsize=8)
    axes.set_ylim(0, 1.05)
    axes.set(ylabel="right answers")
    _title(figure, results, seeds="; bars: mean, lines: range over seeds")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return write_figure_atomic(figure, path, dpi=120)


def _losses(results: Results, path: Path) -> Path:
    """Loss against tokens: one panel for each stage, one line for each seed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    stages = results.stages()
    variants = results.experiment.variants
    colors = colormaps["tab10" if len(variants) <= 10 else "tab20"]
    figure = Figure(figsize=(1.5 + 3.6 * len(stages), 3.6), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    drawn: dict[str, Any] = {}
    for stage, axes in zip(stages, panels, strict=True):
        for cell in results.cells:
            if stage not in cell.training:
                continue
            curve = cell.training[stage].curve
            color = colors(variants.index(cell.variant) % colors.N)
            (line,) = axes.plot(
                [n / 1e6 for n, _ in curve], [loss for _, loss in curve], color=color, linewidth=1.2
            )
            drawn.setdefault(cell.variant, line)
        axes.set(title=stage, xlabel="tokens (millions)", ylabel="loss")
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    shown = [variant for variant in variants if variant in drawn]
    panels[-1].legend(
        [drawn[v] for v in shown], shown, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1)
    )
    _title(figure, results)
    return write_figure_atomic(figure, path, dpi=120)


def _fits(results: Results, found: list[scaling.Fit], path: Path) -> Path:
    """One panel for each quantity: its points, the law, and the range of laws that leave out one point."""
    import numpy as np
    from matplotlib.figure import Figure

    last = results.experiment.table.fit_tokens
    across = min(3, len(found))
    down = -(-len(found) // across)
    figure = Figure(figsize=(1.0 + 3.6 * across, 0.6 + 3.0 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes, one in zip(panels, found, strict=False):
        axes.plot([n for n, _ in one.points], [y for _, y in one.points], "o", color="#1a73e8")
        if one.law is not None:
            tokens = np.geomspace(one.points[0][0], max(last, one.points[-1][0]), 100)
            axes.plot(tokens, [one.law(n) for n in tokens], color="#1a73e8", linewidth=1.2)
            ranges = [one.range_at(n) for n in tokens]
            if ranges[0] is not None:
                low, high = zip(*(r for r in ranges if r is not None), strict=True)
                axes.fill_between(tokens, low, high, color="#1a73e8", alpha=0.15, linewidth=0)
        axes.axvline(last, color="#5f6368", linestyle=":")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_title(one.name, fontsize=9)
        axes.set_xlabel("tokens, all stages")
        axes.grid(alpha=0.3)
    _title(figure, results, "; band: laws without one of the rows")
    return write_figure_atomic(figure, path, dpi=120)


def _title(figure: Any, results: Results, more: str = "", seeds: str = "") -> None:
    """The experiment's title over a whole picture, in lines that fit; ``seeds``: only if there are several."""
    text = results.experiment.title + more
    if len(results.experiment.seeds) > 1:
        text += seeds
    size = 10.0  # points; a letter's mean width with some margin is 0.6 of it
    letters = figure.get_figwidth() * 72 / (0.6 * size)
    figure.suptitle(textwrap.fill(text, int(letters)), fontsize=size)
