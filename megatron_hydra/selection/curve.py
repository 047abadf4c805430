"""Knockout curve: retrieval accuracy as heads are knocked out, best first or in random order.

With a meaningful ranking, the accuracy falls early for the best heads, and late for random heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_hydra.config.selection import SelectionOptions
from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import HeadMap
from megatron_hydra.hf_identity import model_identity_from_hf, resolve_hf_folder
from megatron_hydra.hf_loading import find_tokenizer
from megatron_hydra.ranks import Ranks
from megatron_hydra.selection.effects import EffectEngine, Solved
from megatron_hydra.selection.opening import Placement, load_runner, vocab_size_of
from megatron_hydra.selection.patching import Head
from megatron_hydra.selection.runner import default_tokens_per_batch
from megatron_hydra.selection.tasks import Tasks
from megatron_hydra.selection.work import WorkBench

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Default shares of all heads to knock out."""


def knockout_curve(
    head_map: HeadMap,
    model: str,
    *,
    source: str = "head map",
    revision: str = "",
    tasks: Sequence[str] = ("retrieval",),
    options: SelectionOptions | None = None,
    counts: Sequence[int] = (),
    draws: int = 3,
    seed: int = 1,
    placement: Placement | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Knock heads out in the order of a map's ranking, and in random orders.

    A knocked-out head gives its mean output over all prompts and tokens. An answer is correct if every token is
    the most likely one after the tokens before it. All drawn prompts count, solved or not.

    Args:
        head_map: a map with a ranking; its FA heads are ignored.
        model: the folder or Hub name that the map was made for.
        source: the map's file, for messages.
        tasks: tasks, as in a selection.
        options: options; only ``num_prompts``, ``probe_tokens`` and ``tokens_per_batch`` are used.
        counts: numbers of heads to knock out; default: the shares in :data:`SHARES`.
        draws: number of random orders.
        seed: seed of prompts and random orders. It differs from the selection's seed, for other prompts.

    Returns:
        The points, ready for JSON: for each count the accuracy and the readout (mean m) under ``score``, and
        under ``random`` a list of both, one entry per draw.

    Raises:
        HydraError: the map has no ranking or is of another model, or a count exceeds the number of heads.
    """
    options = options or SelectionOptions()
    if not head_map.ranking:
        raise HydraError(
            f"{source}: strategy {head_map.strategy} gives no ranking, which the knockout curve needs"
        )
    folder = resolve_hf_folder(model, revision)
    identity = model_identity_from_hf(folder, name=model, revision=revision)
    head_map.check_model(identity, source=source)
    total = identity.num_layers * identity.num_query_heads
    counts = sorted(set(counts or (math.ceil(share * total) for share in SHARES)))
    if counts[0] < 0 or counts[-1] > total:
        raise HydraError(
            f"--heads {counts[-1]}: give numbers from 0 to {total}, the number of heads of the model"
        )
    drawn = Tasks.draw(tasks, find_tokenizer(folder), vocab_size_of(None, folder), seed, options)
    ranks = Ranks()
    try:
        runner = load_runner(None, folder, placement or Placement(), ranks)
        size = options.tokens_per_batch or default_tokens_per_batch(runner)
        bench = WorkBench(ranks, None, show_progress)
        try:
            points = _measure(
                EffectEngine(runner, bench, size), head_map, drawn, counts, draws, seed
            )
        finally:
            bench.close()
    finally:
        ranks.close()
    return {
        "head_map": head_map.fingerprint(),
        "strategy": head_map.strategy,
        "model": model,
        "tasks": {task: len(pairs) for task, pairs in drawn.pairs.items()},
        "probe_tokens": options.probe_tokens,
        "seed": seed,
        "heads": total,
        "points": points,
    }


def _measure(
    engine: EffectEngine,
    head_map: HeadMap,
    drawn: Tasks,
    counts: Sequence[int],
    draws: int,
    seed: int,
) -> list[dict[str, Any]]:
    prompts = {
        task: Solved(pairs, list(range(len(pairs))), np.zeros(0), np.zeros(0))
        for task, pairs in drawn.pairs.items()
    }
    generator, ranking = np.random.default_rng(seed), list(head_map.ranking)
    orders = [[ranking[i] for i in generator.permutation(len(ranking))] for _ in range(draws)]
    means = engine.mean_outputs(prompts)

    @functools.cache  # without knocked-out heads the result is the same in every order
    def left(heads: tuple[Head, ...]) -> tuple[float, float]:
        m, right = zip(
            *(engine.knock_out(task, solved, heads, means) for task, solved in prompts.items()),
            strict=True,
        )
        return float(np.concatenate(right).mean()), float(np.concatenate(m).mean())

    runs = sum(1 + draws if count else 1 for count in counts)
    for task, solved in prompts.items():
        engine.plan_control(task, solved, runs)
    points = []
    for count in counts:
        accuracy, readout = left(tuple(ranking[:count]))
        at_random = [left(tuple(order[:count])) for order in orders]
        points.append(
            {
                "heads": count,
                "score": {"accuracy": accuracy, "readout": readout},
                "random": {
                    "accuracy": [accuracy for accuracy, _ in at_random],
                    "readout": [readout for _, readout in at_random],
                },
            }
        )
    return points
