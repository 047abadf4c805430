"""Pictures of a head map, drawn only from the contents of its file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hydra.errors import HydraError
from megatron_hydra.files import write_figure_atomic
from megatron_hydra.head_map import HeadMap
from megatron_hydra.selection.ranking import rank_heads

CHOSEN = "#d62728"


def draw_head_map(head_map: HeadMap, prefix: str | os.PathLike[str]) -> list[Path]:
    """Write PNGs named ``<prefix>_<what>.png``, as far as the map has the data.

    ``capabilities``: a heatmap for each capability. ``unified``: the ranked score with marks on the chosen
    heads. Both name the skipped tasks. ``distribution``: sorted scores. ``overlap``: top heads that two
    capabilities share. ``trust``: reliability of the scores. ``gates``: results of learned gates at every
    budget. ``layers``: FA heads in each layer. A map without scores gives only the last picture.

    Returns:
        The files written.

    Raises:
        HydraError: matplotlib is not installed.
    """
    pictures: dict[str, Callable[[HeadMap], Any]] = {}
    if head_map.scores:
        pictures |= {"capabilities": _capabilities, "overlap": _overlap}
    if "unified_score" in head_map.details:
        pictures |= {"unified": _unified, "distribution": _distribution}
    if "trust" in head_map.details:
        pictures["trust"] = _trust
    if "gates" in head_map.details:
        pictures["gates"] = _gates
    pictures["layers"] = _layers
    written = []
    for what, draw in pictures.items():
        written.append(
            write_figure_atomic(draw(head_map), f"{os.fspath(prefix)}_{what}.png", dpi=120)
        )
    return written


def draw_knockout(curve: dict[str, Any], path: Path) -> None:
    """Plot accuracy and readout against the number of knocked-out heads (see :func:`knockout_curve`).

    Raises:
        HydraError: matplotlib is not installed.
    """
    points = curve["points"]
    counts = [point["heads"] for point in points]
    figure, axes = _figure(9, 3.4, 2)
    for ax, what in zip(axes, ("accuracy", "readout"), strict=True):
        draws = np.array([point["random"][what] for point in points])
        ax.fill_between(counts, draws.min(1), draws.max(1), color="#9aa0a6", alpha=0.4, lw=0)
        ax.plot(counts, draws.mean(1), "o-", color="#9aa0a6", label="random heads (range)")
        by_score = [point["score"][what] for point in points]
        ax.plot(counts, by_score, "o-", color=CHOSEN, label="the best heads first")
        ax.set_xscale("symlog", linthresh=max(1, min((c for c in counts if c), default=1)))
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.minorticks_off()
        ax.set(xlabel=f"heads knocked out, of {curve['heads']}", ylabel=what)
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].legend(frameon=False)
    write_figure_atomic(figure, path, dpi=120)


def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, np.ndarray]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise HydraError("plots need matplotlib: install it, or use --no-pictures") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.array(figure.subplots(rows, columns)).reshape(-1)


def _heatmap(figure: Any, axes: Any, scores: np.ndarray, title: str) -> None:
    from matplotlib.colors import AsinhNorm

    # A few heads have nearly all of the effect; linear colours would show only these.
    limit = float(np.abs(scores).max()) or 1.0
    norm = AsinhNorm(linear_width=limit / 20, vmin=-limit, vmax=limit)
    image = axes.imshow(scores, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    axes.set(title=title, xlabel="head", ylabel="layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    ticks = [limit * share for share in (-1, -0.3, -0.1, 0, 0.1, 0.3, 1)]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks], minor=False)
    bar.ax.minorticks_off()


def _size(head_map: HeadMap) -> tuple[float, float]:
    m = head_map.model
    return 2.2 + 0.16 * max(m.num_query_heads, 12), 1.4 + 0.14 * max(m.num_layers, 12)


def _capabilities(head_map: HeadMap) -> Any:
    width, height = _size(head_map)
    columns = min(3, len(head_map.scores))
    rows = -(-len(head_map.scores) // columns)
    figure, axes = _figure(width * columns, height * rows, columns, rows)
    prompts = head_map.details.get("prompts", {})
    for ax, (task, scores) in zip(axes, head_map.scores.items(), strict=False):
        _heatmap(figure, ax, np.array(scores), task)
        if task in prompts:
            facts = prompts[task]
            ax.set_title(f"{task}\nsolved {facts['solved']} of {facts['drawn']}", fontsize=9)
    for ax in axes[len(head_map.scores) :]:
        ax.remove()
    _list_omitted_tasks(figure, head_map)
    return figure


def _list_omitted_tasks(figure: Any, head_map: HeadMap) -> None:
    """Write a line below the picture for every default task that was skipped for this model."""
    lines = []
    for task, facts in head_map.details.get("left_out", {}).items():
        solved = f"solved {facts['solved']} of {facts['drawn']}" if facts["drawn"] else "no prompts"
        lines.append(f"left out: {task} ({solved})")
    if lines:
        figure.supxlabel("\n".join(lines), fontsize=8, color=CHOSEN)


def _unified(head_map: HeadMap) -> Any:
    from matplotlib.patches import Rectangle

    width, height = _size(head_map)
    figure, (ax,) = _figure(width * 1.3, height * 1.3)
    title = f"{head_map.strategy}, {head_map.ratio}: unified score, full-attention heads framed"
    _heatmap(figure, ax, np.array(head_map.details["unified_score"]), "")
    ax.set_title(title, fontsize=9)
    for layer, heads in enumerate(head_map.full_attention_heads):
        for head in heads:
            ax.add_patch(
                Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="black", lw=2)
            )
    _list_omitted_tasks(figure, head_map)
    return figure


def _distribution(head_map: HeadMap) -> Any:
    figure, (ax,) = _figure(6, 3.5)
    scores = np.array(head_map.details["unified_score"])
    ordered = rank_heads(scores)
    values = [scores[head] for head in ordered]
    chosen = [h in head_map.full_attention_heads[layer] for layer, h in ordered]
    places = np.arange(len(ordered))
    ax.bar(places, values, color=[CHOSEN if c else "#9aa0a6" for c in chosen], width=1.0)
    ax.bar([0], [0], color=CHOSEN, label=f"full attention ({sum(chosen)})")
    ax.bar([0], [0], color="#9aa0a6", label=f"Gated DeltaNet ({len(chosen) - sum(chosen)})")
    ax.set(xlabel="heads, best first", ylabel="unified score", title="score distribution")
    ax.legend(frameon=False)
    return figure


def _overlap(head_map: HeadMap) -> Any:
    """Share of common heads among two capabilities' top heads (as many as the map has FA heads)."""
    tasks = list(head_map.scores)
    count = max(1, head_map.num_full_attention)
    tops = [set(rank_heads(np.array(head_map.scores[t]))[:count]) for t in tasks]
    shared = np.array([[len(a & b) / count for b in tops] for a in tops])
    figure, (ax,) = _figure(2.8 + 0.7 * len(tasks), 2.2 + 0.55 * len(tasks))
    image = ax.imshow(shared, cmap="viridis", vmin=0, vmax=1)
    for i, row in enumerate(shared):
        for j, value in enumerate(row):
            color = "black" if value > 0.6 else "white"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    labels = [t if len(t) < 24 else t[:21] + "…" for t in tasks]
    ax.set_xticks(range(len(tasks)), labels, rotation=40, ha="right")
    ax.set_yticks(range(len(tasks)), labels)
    ax.set_title(f"shared among the top {count} heads")
    figure.colorbar(image, ax=ax, shrink=0.8)
    return figure


def _trust(head_map: HeadMap) -> Any:
    """Four plots: signal and ties, split halves, other lengths, concentration in layers."""
    trust = head_map.details["trust"]
    figure, (signal, halves, lengths, layers) = _figure(11, 7, 2, 2)
    for number, (name, facts) in enumerate(trust["capabilities"].items()):
        color = f"C{number}"
        values = np.sort(np.array(head_map.scores[name]).reshape(-1))[::-1]
        label = f"{name}: {facts['heads_with_signal']} above {trust['threshold']}"
        places = np.arange(1, len(values) + 1)
        signal.plot(places[values > 0], values[values > 0], ".-", color=color, label=label)
        rows = facts["split_half"]
        for what, style in (("rank_correlation", "o-"), ("overlap", "s--")):
            drawn = [row[what] for row in rows]
            halves.plot([row["pairs"] for row in rows], drawn, style, color=color, ms=4,
                        label=f"{name}: {what.replace('_', ' ')}")  # fmt: skip
            others = [r for r in facts.get("lengths", []) if r.get(what) is not None]
            if not others:
                continue
            lengths.plot([r["tokens"] for r in others], [r[what] for r in others], style,
                         color=color, ms=4, label=f"{name}: {what.replace('_', ' ')}")  # fmt: skip
        gini = facts["gini_by_layer"]
        layers.plot(range(len(gini)), gini, "o-", color=color, ms=3, label=name)
    signal.axhline(trust["threshold"], color="black", lw=0.8, ls=":")
    begin = trust["ties"]["begin"]
    if begin is not None:
        signal.axvline(begin, color="grey", lw=0.8, ls="--", label=f"ties from place {begin} on")
    signal.axvline(trust["full_attention"], color=CHOSEN, lw=0.8, label="full attention")
    signal.set(yscale="log", xlabel="heads, best first", ylabel="score", title="signal")
    halves.set(xlabel="pairs in each half", ylim=(0, 1.05), title="two random halves of the pairs")
    lengths.set(
        xlabel="tokens", ylim=(0, 1.05), title="receivers, against needles of other lengths"
    )
    layers.set(xlabel="layer", ylim=(0, 1.05), title="Gini coefficient of a layer's scores")
    for ax in (signal, halves, lengths, layers):
        if ax.has_data():
            ax.legend(frameon=False, fontsize=7)
        else:
            ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center")
    return figure


def _gates(head_map: HeadMap) -> Any:
    """Three plots: retrieval and KL against the number of FA heads, and the sweep of the gates."""
    gates = head_map.details["gates"]
    rows, sweep = gates["curve"], gates["sweep"]
    counts = [row["heads"] for row in rows]
    figure, (accuracy, divergence, steps) = _figure(13, 3.8, 3)
    for number, name in enumerate(rows[0]["by"]):
        ours = [row["by"][name] for row in rows]
        for style, capability in zip(("o-", "s--", "^:", "d-."), gates["held_out"], strict=False):
            drawn = [one["accuracy"][capability] for one in ours]
            label = f"{name}: {capability}"
            accuracy.plot(counts, drawn, style, color=f"C{number}", ms=4, label=label)
        drawn = [one["text_divergence"] for one in ours]
        divergence.plot(counts, drawn, "^:", color=f"C{number}", ms=4, label=f"{name}: text")
        drawn = [float(np.mean(list(one["divergence"].values()))) for one in ours]
        divergence.plot(counts, drawn, "o-", color=f"C{number}", ms=4, label=f"{name}: answers")
    for ax, value in (
        (accuracy, lambda one: np.mean(list(one["accuracy"].values()))),
        (divergence, lambda one: np.mean(list(one["divergence"].values()))),
    ):
        draws = np.array([[value(one) for one in row["random"]] for row in rows])
        ax.fill_between(counts, draws.min(1), draws.max(1), color="#9aa0a6", alpha=0.4, lw=0,
                        label="random heads (range)")  # fmt: skip
        ax.set_xscale("symlog", linthresh=max(1, min((c for c in counts if c), default=1)))
        ax.set_xticks(counts, [str(count) for count in counts], fontsize=7, rotation=60)
        ax.minorticks_off()
        ax.axvline(head_map.num_full_attention, color=CHOSEN, lw=0.8)
        ax.set_xlabel("full-attention heads")
        ax.legend(frameon=False, fontsize=7)
    accuracy.set(title="held-out prompts: accuracy", ylim=(-0.03, 1.05))
    divergence.set(title="KL to the teacher (nats)", ylim=(0, None))
    for name, style in (("prompts", "-"), ("text", ":")):
        steps.plot(sweep["step"], sweep[name], style, color="C0", label=f"KL: {name}")
    steps.set(xlabel="step", title="the sweep", yscale="symlog", ylim=(0, None))
    steps.plot(sweep["step"], sweep["cost"], color=CHOSEN, label="expected cost (1: all heads)")
    steps.legend(frameon=False, fontsize=7)
    return figure


def _layers(head_map: HeadMap) -> Any:
    figure, (ax,) = _figure(6, 3)
    counts = [len(heads) for heads in head_map.full_attention_heads]
    ax.bar(range(len(counts)), counts, color=CHOSEN)
    ax.set(xlabel="layer", ylabel="full-attention heads", ylim=(0, max(1, *counts) + 0.5))
    ax.set_title(
        f"{head_map.strategy}, {head_map.ratio}: {sum(counts)} of "
        f"{len(counts) * head_map.model.num_query_heads} heads"
    )
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.yaxis.get_major_locator().set_params(integer=True)
    return figure
