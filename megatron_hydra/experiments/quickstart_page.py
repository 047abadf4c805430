"""The quickstart's page: its table, ``metrics.json``, head maps and pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.actions import HEAD_MAP
from megatron_hydra.experiments.plan import Plan
from megatron_hydra.experiments.results import Results, split_column
from megatron_hydra.experiments.spec import CellSpec
from megatron_hydra.experiments.store import StepStore
from megatron_hydra.files import write_figure_atomic, write_json_atomic
from megatron_hydra.quickstart.tasks import PAIRS

_METRICS, _HEADS, _RETRIEVAL, _LOSSES = (
    "metrics.json", "head_importance.png", "retrieval.png", "losses.png",
)  # fmt: skip
PAGE_FILES = (_METRICS, _HEADS, _RETRIEVAL, _LOSSES)
_TITLES = {
    "teacher": "teacher (dense)",
    "hydra": "HydraHead",
    "random": "random heads",
    "all_gdn": "all GDN",
}
_COLORS = {"teacher": "#5f6368", "hydra": "#d62728", "random": "#ff9f1c", "all_gdn": "#1f77b4"}


def write_page(
    results: Results, plan: Plan, store: StepStore, say: Callable[[str], None]
) -> dict[str, Any]:
    """Gather the results of finished cells of one seed, draw, print the table.

    Writes ``metrics.json``, ``head_maps/`` and three pictures into the store's folder.

    Returns:
        The content of ``metrics.json``.
    """
    root = store.root
    metrics = collect_metrics(results, plan, store)
    write_json_atomic(root / _METRICS, metrics)
    pictures = [
        _copy_heads(results, plan, store),
        _draw_retrieval(metrics, root / _RETRIEVAL),
        _draw_losses(results, root / _LOSSES),
    ]
    say("\n" + table(metrics) + "\n")
    for path in (root / _METRICS, *pictures):
        say(str(path))
    return metrics


def collect_metrics(results: Results, plan: Plan, store: StepStore) -> dict[str, Any]:
    """``metrics.json`` from finished cells.

    Returns:
        ``models``, the teacher first; model → length → accuracy; ``train_length``, ``ratio``, ``seed``,
        ``facts``, ``answers_per_cell``; ``seconds`` (``<model>_<step>`` → wall seconds; models share steps);
        ``kv_cache_bytes_per_token`` and ``state_bytes`` of every model, measured on its cache;
        ``full_attention_heads`` of the students.
    """
    specs = {cell.variant: cell.spec for cell in results.experiment.cells}
    cells = {
        cell.variant: cell
        for cell in sorted(results.cells, key=lambda cell: not specs[cell.variant].hf_model)
    }
    accuracy: dict[str, dict[str, float]] = {}
    for model, cell in cells.items():
        lengths = {split_column(column)[1]: share for column, share in cell.accuracy.items()}
        accuracy[model] = {str(length): share for length, share in lengths.items()}
    first = next(iter(cells.values()))
    evaluated = plan.steps[plan.cells[_cell_name(results, first.variant)]]
    (task,) = json.loads((store.out(evaluated) / "results.json").read_text())["tasks"].values()
    return {
        "models": list(cells),
        **accuracy,
        "train_length": results.experiment.table.train_length,
        "ratio": _ratio(list(specs.values())),
        "seed": first.seed,
        "facts": PAIRS,
        "answers_per_cell": next(iter(task.values()))["answers"],
        "seconds": {
            f"{model}_{kind}": seconds
            for model, cell in cells.items()
            for kind, seconds in cell.seconds.items()
        },
        "kv_cache_bytes_per_token": {m: cell.kv_bytes_per_token for m, cell in cells.items()},
        "state_bytes": {m: cell.state_bytes for m, cell in cells.items()},
        "full_attention_heads": {
            m: [list(heads) for heads in cell.fa_heads]
            for m, cell in cells.items()
            if cell.fa_heads is not None
        },
    }


def _cell_name(results: Results, variant: str) -> str:
    (name,) = [cell.name for cell in results.experiment.cells if cell.variant == variant]
    return name


def _ratio(specs: list[CellSpec]) -> str:
    """The value of the first student."""
    return next(spec.selection.ratio for spec in specs if not spec.hf_model)


def table(metrics: dict[str, Any]) -> str:
    """Accuracy against length, and cache bytes, as text."""
    lengths = _lengths(metrics)
    train = metrics["train_length"]
    head = "".join(f"{n} ({n // train}×)".rjust(11) for n in lengths)
    rows = [f"retrieval of {metrics['facts']} facts, share of right answers; length (× training)"]
    rows.append(f"{'':16s}{head}{'KV bytes/token':>16s}{'state bytes':>13s}")
    for model in metrics["models"]:
        shares = "".join(f"{metrics[model][str(n)]:11.3f}" for n in lengths)
        kv = metrics["kv_cache_bytes_per_token"][model]
        title = _TITLES.get(model, model)
        rows.append(f"{title:16s}{shares}{kv:16.0f}{metrics['state_bytes'][model]:13.0f}")
    return "\n".join(rows)


def _lengths(metrics: dict[str, Any]) -> list[int]:
    return sorted(int(length) for length in metrics[metrics["models"][0]])


# -- pictures ------------------------------------------------------------------------------------


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _copy_heads(results: Results, plan: Plan, store: StepStore) -> Path:
    """Write every student's head map and its pictures to ``head_maps/``, with the first ranked score.

    Raises:
        HydraError: a map has no pictures.
    """
    folder = store.root / "head_maps"
    folder.mkdir(exist_ok=True)
    for cell in results.cells:
        keys = plan.ancestors(plan.cells[_cell_name(results, cell.variant)])
        for out in (store.out(plan.steps[k]) for k in keys if plan.steps[k].action == "select"):
            stem = Path(HEAD_MAP).stem
            for path in out.glob(f"{stem}*"):
                shutil.copyfile(path, folder / path.name.replace(stem, cell.variant))
    scored = [name for r in results.cells if (name := folder / f"{r.variant}_unified.png").exists()]
    if not scored:
        raise HydraError(
            f"{folder} has no picture of scores: an earlier version has selected; give --fresh"
        )
    shutil.copyfile(scored[0], store.root / _HEADS)
    return store.root / _HEADS


def _draw_retrieval(metrics: dict[str, Any], path: Path) -> Path:
    """Accuracy against length for all models."""
    figure, (axes,) = _figure(6.4, 4.0)
    lengths = _lengths(metrics)
    for model in metrics["models"]:
        values = [metrics[model][str(n)] for n in lengths]
        axes.plot(
            lengths,
            values,
            marker="o",
            color=_COLORS.get(model),
            label=_TITLES.get(model, model),
        )
    axes.axvline(metrics["train_length"], color="#5f6368", linestyle=":", linewidth=1)
    axes.annotate(
        "teacher's training length",
        (metrics["train_length"], 0.5),
        rotation=90,
        ha="right",
        va="center",
        fontsize=8,
        color="#5f6368",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    axes.set_xlim(lengths[0] * 0.85, lengths[-1] * 1.12)
    axes.set_ylim(-0.03, 1.03)
    axes.set(xlabel="context length (tokens)", ylabel="right answers")
    axes.set_title(f"{metrics['facts']} facts, GDN:FA {metrics['ratio']}, seed {metrics['seed']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return write_figure_atomic(figure, path, dpi=130)


def _draw_losses(results: Results, path: Path) -> Path:
    """The training loss of every student, one panel for each stage."""
    stages = list(dict.fromkeys(stage for cell in results.cells for stage in cell.training))
    figure, panels = _figure(11, 3.4, len(stages))
    for stage, axes in zip(stages, panels, strict=True):
        for cell in results.cells:
            if (training := cell.training.get(stage)) is None:
                continue
            tokens_per_step = training.tokens / training.steps
            axes.plot(
                [tokens / tokens_per_step for tokens, _ in training.curve],
                [loss for _, loss in training.curve],
                color=_COLORS.get(cell.variant),
                label=_TITLES.get(cell.variant, cell.variant),
            )
        axes.set(title=stage, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    return write_figure_atomic(figure, path, dpi=130)
