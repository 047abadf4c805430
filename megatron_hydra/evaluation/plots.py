"""Pictures of an evaluation: length × depth for each task, and accuracy against length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_hydra.files import write_figure_atomic


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the ``results`` of :func:`runner.evaluate`.

    Returns:
        The PNG files written: ``heatmap_<task>.png`` for every task with depths, and
        ``accuracy.png``.
    """
    paths = []
    for task, cells in results["tasks"].items():
        if any(cell["depths"] for cell in cells.values()):
            paths.append(_heatmap(task, cells, folder / f"heatmap_{task}.png"))
    if results["tasks"]:
        paths.append(_curves(results["tasks"], folder / "accuracy.png"))
    return paths


def _heatmap(task: str, cells: dict[str, Any], path: Path) -> Path:
    import numpy as np

    lengths = sorted(cells, key=int)
    depths = sorted({d for cell in cells.values() for d in cell["depths"]}, key=float)
    values = np.full((len(depths), len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        for depth, accuracy in cells[length]["depths"].items():
            values[depths.index(depth), column] = accuracy

    figure, axes = _figure(2.2 + 0.75 * len(lengths), 1.6 + 0.42 * len(depths))
    image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [_tokens(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * float(d):.0f}" for d in depths])
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("depth of the fact (%)")
    axes.set_title(task)
    for row, column in np.ndindex(values.shape):
        if not np.isnan(values[row, column]):
            text = f"{100 * values[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=axes, label="accuracy")
    return write_figure_atomic(figure, path, dpi=140)


def _curves(tasks: dict[str, Any], path: Path) -> Path:
    figure, axes = _figure(6.4, 4.0)
    for task, cells in tasks.items():
        lengths = sorted(cells, key=int)
        accuracy = [cells[n]["accuracy"] for n in lengths]
        axes.plot([int(n) for n in lengths], accuracy, marker="o", label=task)
    every = sorted({int(n) for cells in tasks.values() for n in cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [_tokens(n) for n in every])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return write_figure_atomic(figure, path, dpi=140)


def _tokens(length: str | int) -> str:
    length = int(length)
    return f"{length // 1024}K" if length >= 4096 and length % 1024 == 0 else str(length)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not through pyplot: it needs a display and changes global state of the caller.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
