"""An experiment's tables in a page with other text: they are between two marker lines.

<!-- experiment NAME -->
… rewritten by ``tools/experiment.py table FILE --page PAGE`` …
<!-- end -->
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.results import Results, length_name, split_column
from megatron_hydra.experiments.table import (
    accuracy_text,
    compared_text,
    facts_columns,
    fit_table,
    footnotes,
    question_table,
    row,
    training_table,
)
from megatron_hydra.files import write_text_atomic

_END = "<!-- end -->"


def write_into(page: Path, results: Results) -> None:
    """Put the experiment's tables between its markers.

    Raises:
        HydraError: the page cannot be read, or has no such markers.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HydraError(f"--page {page} cannot be read: {error}") from None
    begin = f"<!-- experiment {results.experiment.name} -->"
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(_END)
    if not found or not ended:
        raise HydraError(
            f"--page {page} has no place for the table: write the lines {begin} and {_END} into it"
        )
    body = "\n".join(section(results)).strip()
    write_text_atomic(page, f"{before}{begin}\n{body}\n{_END}{after}")


def section(results: Results) -> list[str]:
    """Tables: for each task (columns: lengths), lm-eval's metrics, cache, training, laws over tokens.

    A task with several facts has a second table: what is right above taking places in the text as often,
    whatever is asked.
    """
    columns = results.columns()
    parts = [split_column(column) for column in columns]
    lines = [*_samples(results), ""]
    for task in dict.fromkeys(task for task, length in parts if length is not None):
        lengths = [length for other, length in parts if other == task and length is not None]
        headers = [length_name(n) for n in lengths]
        names = [f"{task}@{n}" for n in lengths]
        lines += _table(accuracy_text, results, f"`{task}`", headers, names)
        if any(name in cell.compared for name in names for cell in results.cells):
            corner = f"`{task}`, above by place"
            lines += _table(compared_text, results, corner, headers, names)
    others = [column for column, (_, length) in zip(columns, parts, strict=True) if length is None]
    lines += question_table(results, others)
    lines += row(["", "FA heads", "KV bytes/token", "state bytes"])
    lines += row(["---", "---:", "---:", "---:"])
    for variant in results.experiment.variants:
        lines += row([variant, *facts_columns(results.of(variant))])
    more = [*training_table(results), *fit_table(results)]
    kept = [line for line in more if not line.startswith("## ")]
    return [*lines, *kept, "", *footnotes(results)]


def _samples(results: Results) -> list[str]:
    """The number of questions of a figure."""
    retrieval, questions = [], []
    for evaluation in (cell.spec.evaluation for cell in results.experiment.cells):
        if evaluation.tasks:
            depths = len(evaluation.depths)
            retrieval.append(f"{evaluation.samples} samples at each of {depths} depths")
        if evaluation.lm_eval:
            limit = evaluation.lm_eval_limit
            questions.append(f"{f'the first {limit}' if limit else 'all'} questions")
    parts = {"Retrieval: ": retrieval, "Of lm-eval's sets ": questions}
    return [
        " ".join(
            f"{begin}{' or '.join(dict.fromkeys(found))}."
            for begin, found in parts.items()
            if found
        )
    ]


def _table(
    text_of: Callable[[Results, str, str], str],
    results: Results,
    corner: str,
    headers: list[str],
    columns: list[str],
) -> list[str]:
    lines = [*row([corner, *headers]), *row(["---", *["---:"] * len(headers)])]
    for variant in results.experiment.variants:
        lines += row([variant, *(text_of(results, variant, column) for column in columns)])
    return [*lines, ""]
