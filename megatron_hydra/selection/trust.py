"""Report on the reliability of a head map: share of signal, and repeatability."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_hydra.selection.importance import SIGNAL, Importance, gini
from megatron_hydra.selection.interp import TIE_WEIGHT, Measured
from megatron_hydra.selection.ranking import rank_heads, spearman

HALVES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 32, 64)
"""Pairs in a half."""

DRAWS = 20
"""Number of random splits for each number of pairs."""


def trust_report(
    found: Mapping[str, Measured], fused: np.ndarray, budget: int, seed: int
) -> dict[str, Any]:
    """Make the report of a head map.

    Args:
        found: measurements of every capability.
        fused: the unified scores before equal scores were ordered, ``[L, H]``.
        budget: number of FA heads.
        seed: seed of the splits.
    """
    return {
        "threshold": SIGNAL,
        "heads": int(fused.size),
        "full_attention": budget,
        "heads_with_signal": int(
            np.any([one.importance.score > SIGNAL for one in found.values()], axis=0).sum()
        ),
        "ties": ties(fused),
        "capabilities": {
            name: {
                "heads_with_signal": int((one.importance.score > SIGNAL).sum()),
                "gini": gini(one.importance.score),
                "gini_by_layer": [gini(layer) for layer in one.importance.score],
                "split_half": split_half(one, budget, seed),
            }
            for name, one in found.items()
        },
    }


def ties(scores: np.ndarray) -> dict[str, Any]:
    """Find equal scores in the ranking.

    Returns:
        ``begin``: the first place (from 1) with the same score as the next place, or ``None``. ``heads``:
        number of heads that share their score with another head. ``broken_by``: the order of equal scores,
        in words.
    """
    ordered = np.sort(scores.reshape(-1))[::-1]
    equal = np.flatnonzero(ordered[:-1] == ordered[1:])
    _, counts = np.unique(ordered, return_counts=True)
    return {
        "begin": int(equal[0]) + 1 if len(equal) else None,
        "heads": int(counts[counts > 1].sum()),
        "broken_by": "the effect without kappa, then the earlier layer, then the lower head",
    }


def split_half(found: Measured, budget: int, seed: int) -> list[dict[str, Any]]:
    """Agreement of two disjoint random sets of n pairs, for growing n: means over :data:`DRAWS` splits.

    The receivers for measuring senders were found with all pairs.
    """
    generator = np.random.default_rng([seed, 7])
    pairs = len(found.probe)
    rows = []
    for size in [n for n in HALVES if 2 * n <= pairs]:
        agreements = []
        for _ in range(DRAWS):
            order = generator.permutation(pairs)
            halves = [order[:size], order[size : 2 * size]]
            a, b = (_scores(found, half) for half in halves)
            agreements.append(agreement(a, b, budget))
        rows.append({"pairs": size} | _means(agreements))
    return rows


def _scores(found: Measured, pairs: np.ndarray) -> np.ndarray:
    one = Importance.of(found.receiver[..., pairs], found.sender[..., pairs], found.probe[pairs])
    return one.score + TIE_WEIGHT * one.without_kappa


def agreement(a: np.ndarray, b: np.ndarray, budget: int) -> dict[str, Any]:
    """Rank correlation of two scores, and the share of common top heads.

    All heads without a signal share a rank, because their order is noise. The number of top heads is the number
    of FA heads, but at most the number of heads with a signal in ``a``.
    """
    count = max(1, min(budget, int((a > SIGNAL).sum())))
    shared = set(rank_heads(a)[:count]) & set(rank_heads(b)[:count])
    value = spearman(*(np.where(scores > SIGNAL, scores, 0.0) for scores in (a, b)))
    return {
        "rank_correlation": None if np.isnan(value) else value,
        "overlap": len(shared) / count,
        "top": count,
    }


def _means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over splits; an undefined correlation (one half has no signal) counts as 0."""
    return {
        "rank_correlation": float(np.mean([row["rank_correlation"] or 0.0 for row in rows])),
        "overlap": float(np.mean([row["overlap"] for row in rows])),
    }


def report_lines(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The report of a head map as lines of text: (keyword, text).

    Args:
        details: details of a head map; without the paper's scores the result is empty.
    """
    lines: list[tuple[str, str]] = []
    for name, facts in details.get("capabilities", {}).items():
        added = " + ".join(str(len(one["added"])) for one in facts["rounds"]) or "none"
        receivers = len(facts["receivers"])
        lines.append(("found", f"{name}: {receivers} receivers, senders by round {added}"))
        if "control" in facts:
            lines.append(("control", f"{name}: {_control_line(facts['control'])}"))
    lines += [("gates", text) for text in _gate_lines(details.get("gates"))]
    trust = details.get("trust")
    if not trust:
        return lines
    for name, facts in trust["capabilities"].items():
        text = f"{name}: {facts['heads_with_signal']} heads above {trust['threshold']}"
        text += f", Gini {facts['gini']:.2f}"
        for row in facts["split_half"][-1:]:
            text += (
                f"; halves of {row['pairs']} pairs: rank correlation {row['rank_correlation']:.2f}, "
                f"top heads shared {row['overlap']:.2f}"
            )
        lines.append(("trust", text))
        for row in facts.get("lengths", []):
            lines.append(
                ("trust", f"{name}, receivers at {row['tokens']} tokens: {_length_line(row)}")
            )
    begin = trust["ties"]["begin"]
    where = "none" if begin is None else f"from place {begin} on ({trust['ties']['broken_by']})"
    unheard = trust.get("chosen_without_signal", 0)
    return [*lines, ("trust", f"ties: {where}; {unheard} FA heads have a score of 0")]


def _gate_lines(gates: Mapping[str, Any] | None) -> list[str]:
    """A line for every budget of the curve of learned gates, and for every compared ranking."""
    lines = []
    for row in [] if gates is None else gates["curve"]:
        for name, one in row["by"].items():
            right = ", ".join(f"{task} {share:.2f}" for task, share in one["accuracy"].items())
            drawn = [float(np.mean(list(other["accuracy"].values()))) for other in row["random"]]
            at_random = f"; random heads {min(drawn):.2f} to {max(drawn):.2f}"
            lines.append(
                f"{row['heads']} FA heads by {name}: right {right}, KL of text {one['text_divergence']:.3f}, "
                f"cache {one['cache']:.2f}{at_random if name == 'learned_gates' else ''}"
            )
    return lines


def _control_line(control: Mapping[str, Any]) -> str:
    best, random = (control[kind]["readout_lost"] for kind in ("best", "random"))
    return (
        f"without its {control['knocked_out']} best heads the readout loses {best:.2f} of its gap, without as "
        f"many random ones {random:.2f}"
        + ("" if control["can_fail"] else ": THE PROBE CANNOT FAIL")
    )


def _length_line(row: Mapping[str, Any]) -> str:
    if "overlap" not in row:
        return "no prompt is solved"
    value = row["rank_correlation"]
    shown = "undefined" if value is None else f"{value:.2f}"
    return f"rank correlation {shown}, top heads shared {row['overlap']:.2f} ({row['pairs']} pairs)"
