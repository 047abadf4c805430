"""The experiment's page: a Markdown table of means, and every single value below it."""

from __future__ import annotations

import statistics

from megatron_hydra.experiments.results import CellResult, Results, Spread, split_column


def markdown(results: Results) -> str:
    """The whole page.

    A cell of the first table is mean ± sample standard deviation over seeds; a number in brackets
    says that seeds are missing. The second table holds every value of these columns.
    """
    experiment = results.experiment
    columns = list(experiment.table.columns) or results.columns()
    lengths = [split_column(column)[1] for column in columns]
    lines = [f"# {experiment.title}", ""]
    if experiment.paper:
        lines += [f"The paper: {' '.join(experiment.paper.split())}", ""]
    seeds = ", ".join(map(str, experiment.seeds))
    lines += [f"Share of right answers, mean ± standard deviation over seeds {seeds}."]
    if None in lengths:
        lines += ["Columns with a slash are lm-eval's tasks and metrics."]
    lines += [""]
    lines += _row(["", *columns, "FA heads", "KV bytes/token", "state bytes"])
    lines += _row(["---", *["---:"] * (len(columns) + 3)])
    for variant in experiment.variants:
        cells = results.of(variant)
        values = [_spread(results.spread(variant, column), cells) for column in columns]
        lines += _row([f"**{variant}**", *values, *_facts(cells)])
    lines += ["", *_differences(results, columns)]
    lines += ["## Every value", ""]
    lines += _row(["", "seed", *columns, "FA heads (layer.head)"])
    lines += _row(["---", "---:", *["---:"] * len(columns), "---"])
    for cell in results.cells:
        shown = [f"{cell.accuracy[c]:.3f}" if c in cell.accuracy else "" for c in columns]
        lines += _row([cell.variant, str(cell.seed), *shown, _heads(cell)])
    lines += ["", *_footnotes(results)]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: list[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _spread(spread: Spread | None, cells: list[CellResult]) -> str:
    if spread is None:
        states = {cell.state for cell in cells}
        return "failed" if "failed" in states else "–" if states == {"done"} else "not run"
    text = f"{spread.mean:.3f} ± {spread.deviation:.3f}"
    return text if spread.is_complete else f"{text} [{len(spread.values)} of {len(spread.seeds)}]"


def _facts(cells: list[CellResult]) -> list[str]:
    """FA heads, bytes a token, bytes of state: one number, or least–most over seeds."""
    shown = []
    for name in ("num_fa_heads", "kv_bytes_per_token", "state_bytes"):
        values = [value for cell in cells if (value := getattr(cell, name)) is not None]
        low, high = (f"{min(values):.0f}", f"{max(values):.0f}") if values else ("", "")
        shown.append(low if low == high else f"{low}–{high}")
    heads, *rest = shown
    return [heads or max(cell.attention for cell in cells), *rest]


def _heads(cell: CellResult) -> str:
    if cell.state != "done":
        return f"{cell.state} ({cell.step}: {cell.log})" if cell.log else cell.state
    return cell.attention or _short(cell) or "none"


def _short(cell: CellResult) -> str:
    heads = [(layer, head) for layer, part in enumerate(cell.fa_heads or ()) for head in part]
    names = [f"{layer}.{head}" for layer, head in heads]
    return " ".join(names) if len(names) <= 8 else f"{len(names)} heads"


def _differences(results: Results, columns: list[str]) -> list[str]:
    """Paired by seed: how far every row is from the baseline."""
    baseline = results.experiment.table.baseline
    if not baseline:
        return []
    lines = [f"Difference from **{baseline}**, paired by seed:", ""]
    lines += _row(["", *columns])
    lines += _row(["---", *["---:"] * len(columns)])
    for variant in results.experiment.variants:
        if variant == baseline:
            continue
        shown = []
        for column in columns:
            ours, theirs = results.spread(variant, column), results.spread(baseline, column)
            both = set(ours.values) & set(theirs.values) if ours and theirs else set()
            if not both or ours is None or theirs is None:
                shown.append("")
                continue
            gaps = [ours.values[seed] - theirs.values[seed] for seed in sorted(both)]
            spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
            mean = round(statistics.fmean(gaps), 3) + 0.0  # no "-0.000"
            shown.append(f"{mean:+.3f} ± {spread:.3f}")
        lines += _row([variant, *shown])
    return [*lines, ""]


def _footnotes(results: Results) -> list[str]:
    lines = []
    missing = [c for c in results.cells if c.state != "done"]
    if missing:
        lines.append(f"{len(missing)} of {len(results.cells)} cells are not there:")
        for cell in missing:
            where = f": {cell.step} failed, log {cell.log}" if cell.log else ""
            lines.append(f"- {cell.variant}, seed {cell.seed}: {cell.state}{where}")
        lines.append("")
    sources = {source for cell in results.cells for source in cell.sources}
    if len(sources) > 1:
        lines.append(
            f"Steps were computed with {len(sources)} states of the package's code "
            f"({', '.join(sorted(sources))})."
        )
    return lines
