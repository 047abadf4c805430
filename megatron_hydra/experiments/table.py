"""The experiment's page: a Markdown table of means, and every single value below it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from megatron_hydra.experiments import scaling
from megatron_hydra.experiments.results import CellResult, Results, Spread, split_column


def markdown(results: Results) -> str:
    """The whole page.

    A cell of the first tables is mean ± sample standard deviation over seeds; a number in brackets shows that
    seeds are missing. lm-eval's metrics have a table with one line each, unless ``table.columns`` names them.
    The last table has every value of these columns.
    """
    experiment = results.experiment
    columns = list(experiment.table.columns) or results.columns()
    named = bool(experiment.table.columns)
    across = [c for c in columns if named or split_column(c)[1] is not None]
    down = [c for c in columns if c not in across]
    lines = [f"# {experiment.title}", ""]
    if experiment.paper:
        lines += [f"The paper: {' '.join(experiment.paper.split())}", ""]
    lines += [f"Share of right answers, {_over(experiment.seeds)}."]
    if any(split_column(column)[1] is None for column in columns):
        lines += ["Names with a slash are lm-eval's tasks and metrics."]
    lines += [""]
    lines += row(["", *across, "FA heads", "KV bytes/token", "state bytes"])
    lines += row(["---", *["---:"] * (len(across) + 3)])
    for variant in experiment.variants:
        values = [accuracy_text(results, variant, column) for column in across]
        lines += row([f"**{variant}**", *values, *facts_columns(results.of(variant))])
    lines += ["", *_compared_table(results, across), *question_table(results, down)]
    lines += _differences(results, across, down)
    lines += training_table(results)
    lines += fit_table(results)
    lines += ["## Every value", ""]
    lines += row(["", "seed", *columns, "FA heads (layer.head)"])
    lines += row(["---", "---:", *["---:"] * len(columns), "---"])
    for cell in results.cells:
        shown = [f"{cell.accuracy[c]:.3f}" if c in cell.accuracy else "" for c in columns]
        lines += row([cell.variant, str(cell.seed), *shown, _heads(cell)])
    lines += ["", *footnotes(results)]
    return "\n".join(lines).rstrip() + "\n"


def _compared_table(results: Results, across: Sequence[str]) -> list[str]:
    """For tasks with several facts, what is right above taking places in the text as often."""
    columns = [
        column for column in across if any(column in cell.compared for cell in results.cells)
    ]
    if not columns:
        return []
    lines = [
        "Right above by place: a model that takes places as often as the row, but ignores the question, has 0.",
        "",
    ]
    lines += [*row(["", *columns]), *row(["---", *["---:"] * len(columns)])]
    for variant in results.experiment.variants:
        lines += row([variant, *(compared_text(results, variant, column) for column in columns)])
    return [*lines, ""]


def _over(seeds: Sequence[int]) -> str:
    names = ", ".join(map(str, seeds))
    return f"mean ± standard deviation over seeds {names}" if len(seeds) > 1 else f"seed {names}"


def training_table(results: Results) -> list[str]:
    """Stages of every row: steps, tokens, minutes, speed, first and last loss; mean over seeds."""
    stages = results.stages()
    if not stages:
        return []
    lines = ["## Training", "", "Minutes are of the whole step, loading and saving included.", ""]
    lines += row(["", "stage", "steps", "tokens", "minutes", "tokens/s", "loss, first → last"])
    lines += row(["---", "---", *["---:"] * 5])
    for variant in results.experiment.variants:
        for stage in stages:
            found = [c.training[stage] for c in results.of(variant) if stage in c.training]
            if not found:
                continue
            mean = statistics.fmean
            loss = " → ".join(f"{mean(t.curve[n][1] for t in found):.3g}" for n in (0, -1))
            shown = (
                f"{found[0].steps:,}",
                f"{found[0].tokens:,}",
                f"{mean(t.seconds for t in found) / 60:.1f}",
                f"{mean(t.tokens_per_s for t in found):,.0f}",
            )
            lines += row([variant, stage, *shown, loss])
    return [*lines, ""]


def fit_table(results: Results) -> list[str]:
    """Power laws over the tokens of ``table.fit_rows``, with their predictions."""
    table = results.experiment.table
    if not table.fit_rows or not (found := scaling.fits(results)):
        return []
    more = f"{table.fit_tokens / 1e6:,.0f} M tokens"
    lines = ["## Against tokens", ""]
    lines += [
        "N: tokens of all stages, in millions. The last column leaves out each row once, and gives the "
        "lowest and the highest prediction. Whether the law holds for so many tokens is not known.",
        "",
    ]
    lines += row(["", "rows", "law", "rms residual", f"at {more}", "leaving out one row"])
    lines += row(["---", "---:", "---", "---:", "---:", "---:"])
    for one in found:
        shown = [f"needs {scaling.LEAST_POINTS} rows", "", "", ""]
        if law := one.law:
            around = one.range_at(table.fit_tokens)
            power = f"{law.scale * 1e6**-law.exponent:.3g} · N^−{law.exponent:.2f}"
            shown = [
                f"{law.floor:.3g} + {power}" if law.scale else f"{law.floor:.3g} (does not fall)",
                f"{law.residual:.2g}",
                f"{law(table.fit_tokens):.3g}",
                "not known" if around is None else f"{around[0]:.3g} to {around[1]:.3g}",
            ]
        lines += row([one.name, str(len(one.points)), *shown])
    return [*lines, ""]


def row(cells: list[str]) -> list[str]:
    """A line of a Markdown table."""
    return ["| " + " | ".join(cells) + " |"]


def spread_text(spread: Spread | None, cells: list[CellResult]) -> str:
    """Mean over seeds, with the deviation if there are two or more, or the reason for a missing value."""
    if spread is None:
        states = {cell.state for cell in cells}
        return "failed" if "failed" in states else "–" if states == {"done"} else "not run"
    text = f"{spread.mean:.3f}"
    if spread.deviation is not None:
        text += f" ± {spread.deviation:.3f}"
    return text if spread.is_complete else f"{text} [{len(spread.values)} of {len(spread.seeds)}]"


def accuracy_text(results: Results, variant: str, column: str) -> str:
    """Accuracy of a row in a column."""
    return spread_text(results.spread(variant, column), results.of(variant))


def compared_text(results: Results, variant: str, column: str) -> str:
    """Accuracy above that of taking places."""
    found = results.spread_compared(variant, column)
    if found is None and results.spread(variant, column) is not None:
        return "not counted"  # by an evaluation of an earlier version
    return spread_text(found, results.of(variant))


def facts_columns(cells: list[CellResult]) -> list[str]:
    """FA heads, bytes per token, bytes of state: one number, or the range over seeds."""
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


def question_table(results: Results, columns: Sequence[str]) -> list[str]:
    """lm-eval's metrics, one on each line; the experiment's rows are its columns."""
    variants = results.experiment.variants
    shown = {v: [accuracy_text(results, v, c) for c in columns] for v in variants}
    return _down("questions", columns, shown)


def _down(corner: str, columns: Sequence[str], shown: Mapping[str, Sequence[str]]) -> list[str]:
    """A table with a line for each of ``columns``, and a column for each key of ``shown``."""
    if not columns:
        return []
    lines = [*row([corner, *shown]), *row(["---", *["---:"] * len(shown)])]
    for n, column in enumerate(columns):
        lines += row([column, *(values[n] for values in shown.values())])
    return [*lines, ""]


def _differences(results: Results, across: Sequence[str], down: Sequence[str]) -> list[str]:
    """Difference of every row from the baseline, paired by seed."""
    baseline = results.experiment.table.baseline
    if not baseline:
        return []
    lines = [f"Difference from **{baseline}**, paired by seed:", ""]
    others = [variant for variant in results.experiment.variants if variant != baseline]
    if across:
        lines += row(["", *across])
        lines += row(["---", *["---:"] * len(across)])
        for variant in others:
            lines += row([variant, *(_difference(results, variant, c) for c in across)])
        lines += [""]
    gaps = {variant: [_difference(results, variant, c) for c in down] for variant in others}
    return [*lines, *_down("questions", down, gaps)]


def _difference(results: Results, variant: str, column: str) -> str:
    """Mean of a row minus the baseline, with its deviation if two seeds have both; empty if none has."""
    ours = results.spread(variant, column)
    theirs = results.spread(results.experiment.table.baseline, column)
    both = set(ours.values) & set(theirs.values) if ours and theirs else set()
    if not both or ours is None or theirs is None:
        return ""
    gaps = [ours.values[seed] - theirs.values[seed] for seed in sorted(both)]
    mean = round(statistics.fmean(gaps), 3) + 0.0  # no "-0.000"
    return f"{mean:+.3f} ± {statistics.stdev(gaps):.3f}" if len(gaps) > 1 else f"{mean:+.3f}"


def footnotes(results: Results) -> list[str]:
    """Missing cells; versions of the code, if several."""
    lines = []
    missing = [c for c in results.cells if c.state != "done"]
    if missing:
        lines.append(
            f"{len(missing)} of {len(results.cells)} cells are not there, or only in part:"
        )
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
