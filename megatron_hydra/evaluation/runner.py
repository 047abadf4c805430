"""Run an evaluation over tasks and lengths: progress, resume, results."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_hydra.config.evaluation import EvaluationOptions
from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation import plots
from megatron_hydra.evaluation.backend import Backend
from megatron_hydra.evaluation.finding import load_task
from megatron_hydra.evaluation.hf_backend import HfBackend
from megatron_hydra.evaluation.lm_eval_suite import lm_eval_version, require_lm_eval, run_lm_eval
from megatron_hydra.evaluation.scoring import (
    Outcome,
    Places,
    accuracy_by_place,
    forecast,
    score_samples,
)
from megatron_hydra.evaluation.sharing import compute_shared
from megatron_hydra.evaluation.storage import QUESTIONS, CellStore
from megatron_hydra.evaluation.tasks import RetrievalTask, Sample, SampleRequest
from megatron_hydra.files import JsonFormat, write_json_atomic
from megatron_hydra.ranks import Ranks
from megatron_hydra.stopping import Stopped, exit_if_stopped, stop_requested

FORMAT = JsonFormat("hydra-evaluation", 1, "evaluation")


@dataclasses.dataclass(frozen=True)
class EvaluationSettings(EvaluationOptions):
    """Settings of an evaluation.

    Attributes:
        seed: determines every sample.
        keep_predictions: number of predictions to save in each cell for inspection.
        progress: show a progress bar on stderr.
    """

    seed: int = 1234
    keep_predictions: int = 20
    progress: bool = True


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
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Score a model on every task at every length.

    Args:
        model: a Hugging Face causal model (set to eval mode during the evaluation), or a
            :class:`~.backend.Backend`; all its processes call this function with the same arguments.
        tokenizer: its tokenizer; may be ``None`` if all tasks make token ids.
        tasks: names (see :func:`tasks.load_task`) or tasks.
        lengths: context lengths in tokens.
        settings: settings; ``None``: the defaults.
        output: a folder for ``results.json``, the cells and the pictures. Finished cells of the same
            evaluation in this folder are not run again.
        force: delete an evaluation in the folder.
        name: the model's name in the results.
        ranks: processes that share the cells. Each has the whole Hugging Face model, calls this function with
            the same arguments, and gets the same results.

    Returns:
        ``{"format", "version", "model", "settings", "cache", "tasks": {task: {length: cell}},
        "lm_eval": {"version", "tasks": {task: {metric: value}}}}`` where a cell is ``{"accuracy",
        "samples", "answers", "depths": {depth: accuracy}, "seconds"}`` and all keys are strings.
        ``cache`` and ``lm_eval`` exist only if requested.

    Raises:
        HydraError: a task is unknown, a length is too short for a task, ``output`` has another evaluation, or
            samples do not fit the model.
    """
    settings = settings or EvaluationSettings()
    found = [load_task(task) if isinstance(task, str) else task for task in tasks]
    lengths = sorted({int(n) for n in lengths})
    _check(found, lengths, settings)
    backend = model if isinstance(model, Backend) else HfBackend(model, settings.prefill_chunk)
    on_main = backend.on_main if ranks is None else ranks.on_first
    if ranks is not None:
        if settings.lm_eval and ranks.size > 1:
            raise HydraError("tasks of lm-eval run in one process: start it without torchrun")
        shown = settings.progress and ranks.rank == 0
        settings = dataclasses.replace(settings, progress=shown)
    identity = _identity(backend, settings)
    store = None
    if output is not None:
        store = on_main(lambda: CellStore(Path(output), identity, force))
    results: dict[str, Any] = {
        **FORMAT.add_header({}),
        "model": name,
        "settings": identity,
        "tasks": {task.name: {} for task in found},
    }
    with backend.inference():

        def score(pair: tuple[RetrievalTask, int]) -> dict[str, Any] | None:
            return _cell(backend, tokenizer, *pair, tuple(lengths), settings, store)

        pairs = [(task, length) for task in found for length in lengths]
        cells: Iterator[dict[str, Any] | None] = map(score, pairs)
        if ranks is not None:
            costs = ranks.on_first(lambda: [_cost(*pair, store) for pair in pairs])
            cells = iter(compute_shared(ranks, pairs, costs, score))
        for task in found:
            for length in lengths:
                cell = next(cells)
                if cell is not None:
                    results["tasks"][task.name][str(length)] = cell
            if not results["tasks"][task.name]:
                raise HydraError(f"task {task.name!r} has no sample of length {lengths}")
        if settings.lm_eval:
            results["lm_eval"] = _lm_eval(backend, tokenizer, settings, store)
        cache = None
        if settings.cache_length:
            cache = on_main(lambda: backend.cache_bytes(settings.cache_length))
        if cache is not None:
            results["cache"] = cache
    if output is not None:
        on_main(lambda: _write(results, Path(output)))
    return results


def _lm_eval(
    backend: Backend, tokenizer: Any, settings: EvaluationSettings, store: CellStore | None
) -> dict[str, Any]:
    """Run lm-eval's tasks one by one, and save each finished one like a cell."""
    if not isinstance(backend, HfBackend):
        raise HydraError("lm-eval runs on Hugging Face models: export the checkpoint first")
    require_lm_eval()
    metrics: dict[str, Any] = {}
    for task in settings.lm_eval:
        key = f"lm-eval {lm_eval_version()} {task} {settings.lm_eval_include}"
        if settings.lm_eval_limit:
            key += f" first {settings.lm_eval_limit}"
        kept = None if store is None else store.load(key, QUESTIONS)
        found = kept or run_lm_eval(
            backend.model,
            tokenizer,
            task,
            include=settings.lm_eval_include,
            limit=settings.lm_eval_limit,
            batch_tokens=settings.batch_tokens,
            seed=settings.seed,
        )
        if store is not None:
            store.save(key, QUESTIONS, found)
        exit_if_stopped()  # finished tasks are on disk
        metrics |= found
    body: dict[str, Any] = {"version": lm_eval_version(), "tasks": metrics}
    if settings.lm_eval_limit:
        body["limit"] = settings.lm_eval_limit
    return body


def _write(results: dict[str, Any], output: Path) -> None:
    write_json_atomic(output / "results.json", results)
    plots.draw(results, output)


def _check(
    tasks: Sequence[RetrievalTask], lengths: Sequence[int], settings: EvaluationSettings
) -> None:
    names = [task.name for task in tasks]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise HydraError(f"task {min(twice)!r} is given twice")
    if not (tasks and lengths) and not (settings.lm_eval and not tasks and not lengths):
        raise HydraError(
            "an evaluation needs at least one task and one length, or only tasks of lm-eval"
        )
    if lengths and min(lengths) < 2:
        raise HydraError(f"length {min(lengths)} is too short: use 2 tokens or more")


def _cost(task: RetrievalTask, length: int, store: CellStore | None) -> float:
    """Cost of a cell relative to others: a finished one only has to be read."""
    finished = store is not None and store.path(task.name, length).exists()
    return 0.0 if finished else float(length)


def _cell(
    backend: Backend,
    tokenizer: Any,
    task: RetrievalTask,
    length: int,
    lengths: tuple[int, ...],
    settings: EvaluationSettings,
    store: CellStore | None,
) -> dict[str, Any] | None:
    """Score one (task, length); ``None`` if the task has no sample of this length."""
    task_key = _task_fingerprint(task)
    kept = None
    if store is not None:
        kept = backend.on_main(lambda: store.load(task.name, length))
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
    samples = backend.on_main(lambda: task.samples(request))
    if not samples:
        return None
    _log_expected_duration(backend, tokenizer, f"{task.name} at {length:,} tokens", samples)
    started = time.monotonic()
    outcomes = list(
        _with_progress(
            score_samples(backend, tokenizer, samples, settings.batch_tokens),
            tqdm(
                total=len(samples),
                desc=f"{task.name} {length}",
                disable=not (settings.progress and backend.is_main),
                unit="sample",
            ),
            backend,
        )
    )
    cell = summarise(outcomes, settings.depths) | {"seconds": time.monotonic() - started}
    if store is not None:
        predictions = [
            {"score": sum(o.scores) / len(o.scores), "said": o.prediction, "expected": o.expected}
            for o in outcomes[: settings.keep_predictions]
        ]
        whole = cell | {"task_fingerprint": task_key, "predictions": predictions}
        backend.on_main(lambda: store.save(task.name, length, whole))
    return cell


def _log_expected_duration(
    backend: Backend, tokenizer: Any, what: str, samples: Sequence[Sample]
) -> None:
    """Log the expected time of a cell before it starts, for a back end without a cache."""
    least, most = forecast(backend, tokenizer, samples)
    if not most or not backend.is_main:
        return
    spread = f"about {in_time(least)}"
    if most > least:
        spread = (
            f"{in_time(least)} if all answers are right, up to {in_time(most)} if all are wrong"
        )
    print(
        f"{what}: {len(samples)} samples take {spread}. A checkpoint has no cache: every token that differs "
        "from the draft costs a forward of its prompt. An export (tools/megatron_to_hf.py) has a cache.",
        file=sys.stderr,
        flush=True,
    )


def in_time(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "a second"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _task_fingerprint(task: RetrievalTask) -> str:
    """Hash of a task's options, as shown by its ``repr``."""
    shown = repr(task)
    if " at 0x" in shown:  # the default repr has an address, which changes in every run
        shown = f"{type(task).__module__}.{type(task).__qualname__}"
    return hashlib.sha256(shown.encode()).hexdigest()[:16]


def summarise(outcomes: Sequence[Outcome], depths: Sequence[float]) -> dict[str, Any]:
    """Mean score over all answers, and over the answers nearest to each depth.

    If samples have several facts, ``confused`` is the share of samples answered with another fact's value.
    ``asked`` and ``picked`` are shares of samples by the order of facts in the text: where the right fact was,
    and which one the answer has. So ``max(asked)`` is the accuracy of always picking the same place, and
    ``by_place`` that of picking places as often as these answers, whatever is asked. What is above it compares.
    """
    scores = [score for outcome in outcomes for score in outcome.scores]
    by_depth: dict[float, list[float]] = {}
    for outcome in outcomes:
        for score, depth in zip(outcome.scores, outcome.depths, strict=True):
            if depth is not None:
                nearest = min(depths, key=lambda d: abs(d - depth))
                by_depth.setdefault(nearest, []).append(score)
    confused = [outcome.confused for outcome in outcomes if outcome.confused is not None]
    return {
        "accuracy": sum(scores) / len(scores),
        "samples": len(outcomes),
        "answers": len(scores),
        "depths": {f"{d:g}": sum(by_depth[d]) / len(by_depth[d]) for d in sorted(by_depth)},
        **({"confused": sum(confused) / len(confused)} if confused else {}),
        **_by_place([outcome.places for outcome in outcomes if outcome.places is not None]),
    }


def _by_place(places: Sequence[Places]) -> dict[str, Any]:
    """Shares of samples whose right fact, and whose answered fact, has each place; their chance agreement."""
    if not places:
        return {}
    order = range(max(place.count for place in places))
    asked = [sum(p.asked == place for p in places) / len(places) for place in order]
    picked = [sum(p.picked == place for p in places) / len(places) for place in order]
    return {"asked": asked, "picked": picked, "by_place": accuracy_by_place(asked, picked)}


def _public(cell: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in cell.items() if k not in ("task_fingerprint", "predictions")}


def _with_progress(outcomes: Iterator[Outcome], bar: Any, backend: Backend) -> Iterator[Outcome]:
    """Yield outcomes and show progress; exit with status 85 after a stop request."""
    right, count = 0.0, 0
    with bar:
        for outcome in outcomes:
            right, count = right + sum(outcome.scores), count + len(outcome.scores)
            bar.update()
            bar.set_postfix(accuracy=f"{right / count:.3f}", refresh=False)
            if backend.anywhere(stop_requested()):  # finished cells are on disk
                if backend.is_main:
                    print(
                        "stopped: the same command resumes from here", file=sys.stderr, flush=True
                    )
                raise Stopped
            yield outcome


def _identity(backend: Backend, settings: EvaluationSettings) -> dict[str, Any]:
    """All settings that determine the results. They are saved with the results and compared on resume."""
    return backend.identity() | {
        "samples": settings.samples,
        "depths": list(settings.depths),
        "seed": settings.seed,
        "haystack": hashlib.sha256(settings.haystack.encode()).hexdigest()[:16],
    }
