"""The quickstart's results: table, ``metrics.json``, pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hydra.files import write_figure_atomic, write_json_atomic
from megatron_hydra.head_map import HeadMap
from megatron_hydra.quickstart.tasks import PAIRS, TRAIN_LENGTH
from megatron_hydra.quickstart.workspace import STAGES, STUDENTS, Workspace

MODELS = ("teacher", *STUDENTS)
TITLES = {
    "teacher": "teacher (dense)",
    "hydra": "HydraHead",
    "random": "random heads",
    "all_gdn": "all GDN",
}
_COLORS = {"teacher": "#5f6368", "hydra": "#d62728", "random": "#ff9f1c", "all_gdn": "#1f77b4"}


def write_report(
    workspace: Workspace, settings: dict[str, Any], ratio: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Gather the results, draw, print the table.

    Returns:
        What ``metrics.json`` holds.
    """
    metrics = collect_metrics(workspace, settings, ratio)
    write_json_atomic(workspace.root / "metrics.json", metrics)
    pictures = [
        workspace.root / "head_importance.png",
        _draw_retrieval(metrics, workspace.root / "retrieval.png"),
        _draw_losses(workspace, workspace.root / "losses.png"),
    ]
    say("\n" + table(metrics) + "\n")
    for path in (workspace.root / "metrics.json", *pictures):
        say(str(path))
    return metrics


def collect_metrics(workspace: Workspace, settings: dict[str, Any], ratio: str) -> dict[str, Any]:
    """``metrics.json`` from the files of the finished phases.

    Returns:
        model → length → accuracy for the four models; ``train_length``, ``ratio``, ``seed``,
        ``facts``; ``seconds`` (phase → wall seconds); ``kv_cache_bytes_per_token`` and
        ``state_bytes`` of every model, measured on its cache; ``full_attention_heads``.
    """
    results = {
        model: json.loads((workspace.evaluation(model) / "results.json").read_text())
        for model in MODELS
    }
    cells = {model: body["tasks"]["facts"] for model, body in results.items()}
    maps = {s: HeadMap.load(workspace.head_map(s)) for s in STUDENTS}
    return {
        **{m: {n: c["accuracy"] for n, c in cells[m].items()} for m in MODELS},
        "train_length": TRAIN_LENGTH,
        "ratio": ratio,
        "seed": settings["seed"],
        "facts": PAIRS,
        "answers_per_cell": next(iter(cells["teacher"].values()))["answers"],
        "seconds": workspace.seconds(),
        "kv_cache_bytes_per_token": {m: results[m]["cache"]["kv_bytes_per_token"] for m in MODELS},
        "state_bytes": {m: results[m]["cache"]["state_bytes"] for m in MODELS},
        "full_attention_heads": {
            s: [list(heads) for heads in head_map.full_attention_heads]
            for s, head_map in maps.items()
        },
    }


def table(metrics: dict[str, Any]) -> str:
    """Accuracy against length, and cache bytes, as text."""
    lengths = sorted(metrics["teacher"], key=int)
    train = metrics["train_length"]
    head = "".join(f"{n} ({int(n) // train}×)".rjust(11) for n in lengths)
    rows = [f"retrieval of {metrics['facts']} facts, share of right answers; length (× training)"]
    rows.append(f"{'':16s}{head}{'KV bytes/token':>16s}{'state bytes':>13s}")
    for model in MODELS:
        shares = "".join(f"{metrics[model][n]:11.3f}" for n in lengths)
        kv = metrics["kv_cache_bytes_per_token"][model]
        rows.append(f"{TITLES[model]:16s}{shares}{kv:16.0f}{metrics['state_bytes'][model]:13.0f}")
    return "\n".join(rows)


# -- pictures ------------------------------------------------------------------------------------


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _draw_retrieval(metrics: dict[str, Any], path: Path) -> Path:
    """Accuracy against length for the four models."""
    figure, (axes,) = _figure(6.4, 4.0)
    lengths = sorted(int(n) for n in metrics["teacher"])
    for model in MODELS:
        values = [metrics[model][str(n)] for n in lengths]
        axes.plot(lengths, values, marker="o", color=_COLORS[model], label=TITLES[model])
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


def _draw_losses(workspace: Workspace, path: Path) -> Path:
    """The training loss of every student, one panel a stage."""
    figure, panels = _figure(11, 3.4, len(STAGES))
    for stage, axes in zip(STAGES, panels, strict=True):
        for student in STUDENTS:
            lines = (workspace.run(student, stage) / "metrics.jsonl").read_text().splitlines()
            entries = [json.loads(line) for line in lines]
            axes.plot(
                [e["step"] for e in entries],
                [e["loss"] for e in entries],
                color=_COLORS[student],
                label=TITLES[student],
            )
        axes.set(title=stage, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    return write_figure_atomic(figure, path, dpi=130)
