"""Quantities of an experiment against the tokens of its rows: a power law, its error, and what it predicts.

The law is y(N) = floor + scale · N^−exponent with floor, scale ≥ 0, fitted by least squares. Hoffmann et al.
(arXiv 2203.15556) use it for losses. Nothing says that it holds far beyond the measured tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from megatron_hydra.experiments.results import CellResult, Results, split_column

Points = Sequence[tuple[float, float]]

_EXPONENTS = np.geomspace(0.02, 4.0, 600)
LEAST_POINTS = 3
"""A law has three parameters. With so many points its residual is zero, and its error is unknown."""
LAST = 0.1
"""Share of a stage's entries whose mean is its last loss."""


@dataclasses.dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        floor, scale, exponent: its parameters; N in tokens.
        residual: root of the mean squared distance from the points.
    """

    floor: float
    scale: float
    exponent: float
    residual: float

    def __call__(self, tokens: float) -> float:
        """The law's value."""
        return float(self.floor + self.scale * tokens**-self.exponent)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A quantity against tokens.

    Attributes:
        name: of the quantity.
        points: (tokens, mean over seeds) of each row, ascending.
        law: ``None`` with fewer than :data:`LEAST_POINTS` different numbers of tokens.
        others: laws that leave out one point each; empty if too few points would be left.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    law: Law | None
    others: tuple[Law, ...]

    def range_at(self, tokens: float) -> tuple[float, float] | None:
        """The smallest and the largest prediction of the laws that leave out one point."""
        values = [law(tokens) for law in self.others]
        return (min(values), max(values)) if values else None


def fit_law(points: Points) -> Law:
    """The law with the least squared error; each exponent of a grid is tried.

    Args:
        points: (tokens, value), at least one.
    """
    tokens, values = np.array(points, dtype=np.float64).T
    # In units of their geometric mean: powers of token counts are too small for a stable solution.
    unit = np.exp(np.log(tokens).mean())
    best: tuple[float, Law] | None = None
    for exponent in _EXPONENTS:
        power = (tokens / unit) ** -exponent
        floor, scale = _not_negative(power, values)
        error = float(((floor + scale * power - values) ** 2).mean())
        if best is None or error < best[0]:
            law = Law(floor, scale * unit**exponent, float(exponent), error**0.5)
            best = error, law
    assert best is not None
    return best[1]


def _not_negative(power: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Floor and scale ≥ 0 of values ≈ floor + scale · power, by least squares."""
    centred = power - power.mean()
    spread = float(centred @ centred)
    scale = float(centred @ values) / spread if spread > 0 else 0.0
    floor = float(values.mean() - scale * power.mean())
    if scale < 0:
        return max(float(values.mean()), 0.0), 0.0
    if floor < 0:
        return 0.0, max(float(power @ values / (power @ power)), 0.0)
    return floor, scale


def fit(name: str, points: Points) -> Fit:
    """Fit a law to the points, and one without each of them."""
    points = tuple(sorted(points))
    different = len({tokens for tokens, _ in points})
    law = fit_law(points) if different >= LEAST_POINTS else None
    others: tuple[Law, ...] = ()
    if different > LEAST_POINTS:
        others = tuple(fit_law((*points[:n], *points[n + 1 :])) for n in range(len(points)))
    return Fit(name, points, law, others)


def fits(results: Results) -> list[Fit]:
    """Every quantity of the rows ``table.fit_rows`` that at least one of them has.

    Quantities: the last loss of each stage; the share of wrong answers up to ``table.train_length`` and beyond
    it; lm-eval's perplexities.
    """
    table = results.experiment.table
    rows = [[c for c in results.of(row) if c.training] for row in table.fit_rows]
    rows = [cells for cells in rows if cells]
    quantities: dict[str, Callable[[CellResult], float | None]] = {
        f"last loss of {stage}": functools.partial(_last_loss, stage)
        for stage in dict.fromkeys(s for cells in rows for cell in cells for s in cell.training)
    }
    if native := table.train_length:
        quantities[f"wrong answers to {native:,} tokens"] = functools.partial(_wrong, 0, native)
        beyond = functools.partial(_wrong, native, math.inf)
        quantities[f"wrong answers beyond {native:,} tokens"] = beyond
    else:
        quantities["wrong answers"] = functools.partial(_wrong, 0, math.inf)
    for column in results.columns():
        if column.endswith("/perplexity"):
            quantities[column] = functools.partial(_metric, column)
    found = []
    for name, quantity in quantities.items():
        points = []
        for cells in rows:
            values = [v for cell in cells if (v := quantity(cell)) is not None]
            if values:
                tokens = float(sum(stage.tokens for stage in cells[0].training.values()))
                points.append((tokens, statistics.fmean(values)))
        if points:
            found.append(fit(name, points))
    return found


def _metric(column: str, cell: CellResult) -> float | None:
    return cell.accuracy.get(column)


def _last_loss(stage: str, cell: CellResult) -> float | None:
    if stage not in cell.training:
        return None
    losses = [loss for _, loss in cell.training[stage].curve]
    return statistics.fmean(losses[-max(1, round(LAST * len(losses))) :])


def _wrong(above: float, up_to: float, cell: CellResult) -> float | None:
    """Mean share of wrong answers over all tasks at lengths above one and up to another."""
    right = []
    for column, value in cell.accuracy.items():
        length = split_column(column)[1]
        if length is not None and above < length <= up_to:
            right.append(value)
    return 1.0 - statistics.fmean(right) if right else None
