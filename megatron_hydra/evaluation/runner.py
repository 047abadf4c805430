"""Going over tasks and lengths: progress, resuming, results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation import plots
from megatron_hydra.evaluation.cache_bytes import measure_cache_bytes
from megatron_hydra.evaluation.scoring import Outcome, prefill_chunk, score_samples
from megatron_hydra.evaluation.storage import CellStore, replace_file
from megatron_hydra.evaluation.tasks import RetrievalTask, SampleRequest, load_task
from megatron_hydra.head_map import fingerprint_tensors
from megatron_hydra.stopping import leave_if_stopped

FORMAT = "hydra-evaluation"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How an evaluation is done.

    Attributes:
        depths: where facts are placed, 0 … 1; rows of the heatmap.
        samples: samples of each (task, length, depth), or of each (task, length) without depths.
        seed: decides every sample.
        batch_tokens: tokens of a batch, at most (one sample at least).
        prefill_chunk: tokens of a prompt passed at a time, 0: all; ``None``: 8192 for models for
            which that is known to be exact, else all.
        haystack: distractor text for tasks that hide facts in text, or ``""``.
        keep_predictions: predictions of each cell that are kept for a person to read.
        cache_length: measure the cache's bytes with a prompt of so many tokens; 0: do not.
        progress: show a progress bar on stderr.
    """

    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 10
    seed: int = 1234
    batch_tokens: int = 32768
    prefill_chunk: int | None = None
    haystack: str = ""
    keep_predictions: int = 20
    cache_length: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_tokens < 1:
            raise HydraError("samples and batch_tokens must be 1 or more")
        if not self.depths or any(not 0 <= d <= 1 for d in self.depths):
            raise HydraError(f"depths {list(self.depths)} must lie in 0..1, and not be empty")


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | RetrievalTask],
    lengths: Sequence[int],
    settings: EvaluationSettings | None = None,
    *,
    output: str | Path | None = None,
    force: bool = False,
    name: str = "",
) -> dict[str, Any]:
    """Score a model on every task at every length.

    Args:
        model: a Hugging Face causal model (put into eval mode here, and back).
        tokenizer: its tokenizer; may be ``None`` if all tasks make token ids.
        tasks: names (see :func:`tasks.load_task`) or tasks.
        lengths: context lengths in tokens.
        settings: the defaults when absent.
        output: a folder for ``results.json``, the cells and the pictures. Finished cells of the
            same evaluation found there are not run again.
        force: throw away what the folder holds.
        name: the model's name in the results.

    Returns:
        ``{"format", "version", "model", "settings", "cache", "tasks": {task: {length: cell}}}``
        where a cell is ``{"accuracy", "samples", "answers", "depths": {depth: accuracy},
        "seconds"}`` and all keys are strings. ``cache`` is absent unless it was measured.

    Raises:
        HydraError: an unknown task, a length too short for a task, another evaluation in
            ``output``, samples that do not fit the model.
    """
    settings = settings or EvaluationSettings()
    found = [load_task(task) if isinstance(task, str) else task for task in tasks]
    lengths = sorted({int(n) for n in lengths})
    _check(found, lengths)
    identity = _identity(model, settings)
    store = None if output is None else CellStore(Path(output), identity, force)
    results: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": name,
        "settings": identity,
        "tasks": {task.name: {} for task in found},
    }
    was_training = model.training
    model.eval()
    try:
        for task in found:
            for length in lengths:
                cell = _cell(model, tokenizer, task, length, tuple(lengths), settings, store)
                if cell is not None:
                    results["tasks"][task.name][str(length)] = cell
            if not results["tasks"][task.name]:
                raise HydraError(f"task {task.name!r} has no sample of length {lengths}")
        if settings.cache_length:
            results["cache"] = measure_cache_bytes(model, settings.cache_length)
    finally:
        model.train(was_training)
    if output is not None:
        with replace_file(Path(output) / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
        plots.draw(results, Path(output))
    return results


def _check(tasks: Sequence[RetrievalTask], lengths: Sequence[int]) -> None:
    names = [task.name for task in tasks]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise HydraError(f"task {min(twice)!r} is given twice")
    if not tasks or not lengths:
        raise HydraError("an evaluation needs a task and a length at least")
    if min(lengths) < 2:
        raise HydraError(f"length {min(lengths)} is too short: use 2 tokens or more")


def _cell(
    model: Any,
    tokenizer: Any,
    task: RetrievalTask,
    length: int,
    lengths: tuple[int, ...],
    settings: EvaluationSettings,
    store: CellStore | None,
) -> dict[str, Any] | None:
    """One (task, length); ``None`` where the task has no sample of that length."""
    task_key = _task_fingerprint(task)
    kept = None if store is None else store.load(task.name, length)
    if kept is not None and kept.get("task_fingerprint") == task_key:
        return _public(kept)
    request = SampleRequest(
        length=length,
        count=settings.samples,
        seed=settings.seed,
        depths=settings.depths,
        tokenizer=tokenizer,
        lengths=lengths,
        haystack=settings.haystack,
    )
    samples = task.samples(request)
    if not samples:
        return None
    started = time.monotonic()
    chunk = prefill_chunk(model, settings.prefill_chunk)
    outcomes = list(
        _with_progress(
            score_samples(model, tokenizer, samples, settings.batch_tokens, chunk),
            len(samples),
            f"{task.name} {length}",
            settings.progress,
        )
    )
    cell = summarise(outcomes, settings.depths) | {"seconds": time.monotonic() - started}
    if store is not None:
        predictions = [
            {"score": sum(o.scores) / len(o.scores), "said": o.prediction, "expected": o.expected}
            for o in outcomes[: settings.keep_predictions]
        ]
        store.save(
            task.name,
            length,
            cell | {"task_fingerprint": task_key, "predictions": predictions},
        )
    return cell


def _task_fingerprint(task: RetrievalTask) -> str:
    """Hash of a task's options, as far as its ``repr`` shows them."""
    shown = repr(task)
    if " at 0x" in shown:  # the default repr: an address, another one in every run
        shown = f"{type(task).__module__}.{type(task).__qualname__}"
    return hashlib.sha256(shown.encode()).hexdigest()[:16]


def summarise(outcomes: Sequence[Outcome], depths: Sequence[float]) -> dict[str, Any]:
    """Mean score over all answers, and over those nearest to each depth."""
    scores = [score for outcome in outcomes for score in outcome.scores]
    by_depth: dict[float, list[float]] = {}
    for outcome in outcomes:
        for score, depth in zip(outcome.scores, outcome.depths, strict=True):
            if depth is not None:
                nearest = min(depths, key=lambda d: abs(d - depth))
                by_depth.setdefault(nearest, []).append(score)
    return {
        "accuracy": sum(scores) / len(scores),
        "samples": len(outcomes),
        "answers": len(scores),
        "depths": {f"{d:g}": sum(by_depth[d]) / len(by_depth[d]) for d in sorted(by_depth)},
    }


def _public(cell: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in cell.items() if k not in ("task_fingerprint", "predictions")}


def _with_progress(outcomes: Any, total: int, label: str, shown: bool) -> Any:
    from tqdm import tqdm

    right, count = 0.0, 0
    with tqdm(total=total, desc=label, disable=not shown, unit="sample") as bar:
        for outcome in outcomes:
            right, count = right + sum(outcome.scores), count + len(outcome.scores)
            bar.update()
            bar.set_postfix(accuracy=f"{right / count:.3f}", refresh=False)
            leave_if_stopped()  # finished cells are on disk
            yield outcome


def _identity(model: Any, settings: EvaluationSettings) -> dict[str, Any]:
    """What decides the results: kept beside them, compared when a run is resumed."""
    # Vectors (norms, scales, biases) differ between any two trained models, and are few.
    vectors = {n: p for n, p in model.named_parameters() if p.ndim == 1}
    if not vectors:
        vectors = dict(list(model.named_parameters())[:1])
    return {
        "model_type": getattr(model.config, "model_type", ""),
        "weights": fingerprint_tensors(vectors),
        "dtype": str(getattr(model, "dtype", torch.float32)).removeprefix("torch."),
        "samples": settings.samples,
        "depths": list(settings.depths),
        "seed": settings.seed,
        "haystack": hashlib.sha256(settings.haystack.encode()).hexdigest()[:16],
        "prefill_chunk": settings.prefill_chunk,
    }
