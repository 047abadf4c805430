"""Results of an experiment: the state of every cell, and mean and spread over seeds."""

from __future__ import annotations

import dataclasses
import json
import statistics
from typing import Any

from megatron_hydra.config.loading import from_dict
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.scoring import accuracy_by_place
from megatron_hydra.evaluation.storage import unfinished_results
from megatron_hydra.experiments.actions import HEAD_MAP
from megatron_hydra.experiments.plan import Plan, Step
from megatron_hydra.experiments.spec import TEACHER, Cell, CellSpec, Experiment
from megatron_hydra.experiments.store import StepStore
from megatron_hydra.head_map import HeadMap
from megatron_hydra.reporting import METRICS_FILE


@dataclasses.dataclass(frozen=True)
class Training:
    """The figures of a stage's ``metrics.jsonl``.

    Attributes:
        steps, tokens: of the whole stage; tokens with padding.
        seconds: of the whole step of the experiment, with loading and saving.
        tokens_per_s: median over the entries.
        curve: (tokens, loss) of at most :data:`CURVE_POINTS` entries, with the last one.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float
    curve: tuple[tuple[int, float], ...]


CURVE_POINTS = 200


@dataclasses.dataclass(frozen=True)
class CellResult:
    """One variant with one seed.

    Attributes:
        variant, seed: its place.
        state: ``done``, ``failed``, ``unfinished`` (its evaluation has been stopped or is running) or
            ``missing``.
        accuracy: ``task@length`` → share of right answers, ``task/metric`` → lm-eval's. An unfinished
            evaluation has some of them.
        compared: the same for tasks with several facts, minus the share that is right by taking places in the
            text as often, whatever is asked (``by_place`` of an evaluation).
        kv_bytes_per_token, state_bytes: of the cache, measured on the running model.
        fa_heads: for each layer the FA heads; ``None``: no head map chose them.
        attention: without a head map, the kind of attention; ``–``: not known.
        log: of the step that failed, or ``""``.
        step: name of the step that failed, or ``""``.
        seconds: of every step.
        training: stage → its figures.
        sources: hashes of the package's code that computed its steps.
    """

    variant: str
    seed: int
    state: str
    accuracy: dict[str, float] = dataclasses.field(default_factory=dict)
    compared: dict[str, float] = dataclasses.field(default_factory=dict)
    kv_bytes_per_token: float | None = None
    state_bytes: float | None = None
    fa_heads: tuple[tuple[int, ...], ...] | None = None
    attention: str = ""
    log: str = ""
    step: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    training: dict[str, Training] = dataclasses.field(default_factory=dict)
    sources: tuple[str, ...] = ()

    @property
    def num_fa_heads(self) -> int | None:
        """Number of FA heads."""
        return None if self.fa_heads is None else sum(map(len, self.fa_heads))


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and spread over seeds.

    Attributes:
        values: seed → value, for available seeds.
        seeds: all expected seeds.
    """

    values: dict[int, float]
    seeds: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean over the available seeds."""
        return statistics.fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; ``None`` for one value, whose spread is not known."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def is_complete(self) -> bool:
        """Whether no seed is missing."""
        return set(self.values) == set(self.seeds)


@dataclasses.dataclass(frozen=True)
class Results:
    """All cells of an experiment."""

    experiment: Experiment
    cells: tuple[CellResult, ...]

    def of(self, variant: str) -> list[CellResult]:
        """The cells of a row."""
        return [cell for cell in self.cells if cell.variant == variant]

    def columns(self) -> list[str]:
        """All columns: ``task@length`` in the order of tasks with ascending lengths, then lm-eval's."""
        tasks: dict[str, set[int]] = {}
        others: dict[str, None] = {}
        for column in (column for cell in self.cells for column in cell.accuracy):
            task, length = split_column(column)
            if length is None:
                others[column] = None
            else:
                tasks.setdefault(task, set()).add(length)
        known = [f"{task}@{n}" for task, lengths in tasks.items() for n in sorted(lengths)]
        return [*known, *others]

    def stages(self) -> list[str]:
        """All trained stages, in the order of the experiment's file. A row may skip some."""
        order = dict.fromkeys(stage for cell in self.experiment.cells for stage in cell.spec.stages)
        found = dict.fromkeys(stage for cell in self.cells for stage in cell.training)
        return [stage for stage in {**order, **found} if stage in found]

    def spread(self, variant: str, column: str) -> Spread | None:
        """Accuracy of a row in a column; ``None`` if no seed has it."""
        return self._spread({c.seed: c.accuracy.get(column) for c in self.of(variant)})

    def spread_compared(self, variant: str, column: str) -> Spread | None:
        """``compared`` of a row in a column; ``None`` if no seed has it."""
        return self._spread({c.seed: c.compared.get(column) for c in self.of(variant)})

    def _spread(self, values: dict[int, float | None]) -> Spread | None:
        known = {seed: value for seed, value in values.items() if value is not None}
        return Spread(known, self.experiment.seeds) if known else None

    def failed(self) -> list[CellResult]:
        """The cells that failed."""
        return [cell for cell in self.cells if cell.state == "failed"]

    def to_dict(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        experiment = self.experiment
        return {
            "format": "hydra-experiment-results",
            "experiment": experiment.name,
            "title": experiment.title,
            "seeds": list(experiment.seeds),
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
        }


def length_name(tokens: int) -> str:
    """``4K`` for 4096 tokens; a number for what is no multiple of 1024."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def split_column(column: str) -> tuple[str, int | None]:
    """``task@length`` in its parts; lm-eval's ``task/metric`` is one part without a length.

    Raises:
        HydraError: it has neither form.
    """
    task, _, length = column.rpartition("@")
    if task and length.isdecimal():
        return task, int(length)
    if "/" not in column:
        raise HydraError(
            f"table column {column!r} is neither of the form task@length nor, for lm-eval, task/metric"
        )
    return column, None


def collect(experiment: Experiment, plan: Plan, store: StepStore) -> Results:
    """Read the finished cells, and the finished parts of others; record why the rest is missing."""
    return Results(experiment, tuple(_cell(cell, plan, store) for cell in experiment.cells))


def _accuracy(body: dict[str, Any]) -> dict[str, float]:
    """Columns of an evaluation's ``results.json``; lm-eval's error bars are omitted."""
    found = {
        f"{task}@{length}": part["accuracy"]
        for task, lengths in body["tasks"].items()
        for length, part in lengths.items()
    }
    for task, metrics in body.get("lm_eval", {}).get("tasks", {}).items():
        for name, value in metrics.items():
            if isinstance(value, float) and "_stderr" not in name:
                found[f"{task}/{name.removesuffix(',none')}"] = value
    return found


def _compared(body: dict[str, Any]) -> dict[str, float]:
    """Accuracy above that of taking places; an evaluation that did not count places has none."""
    return {
        f"{task}@{length}": part["accuracy"] - accuracy_by_place(part["asked"], part["picked"])
        for task, lengths in body["tasks"].items()
        for length, part in lengths.items()
        if "picked" in part
    }


def _training(step: Step, store: StepStore) -> Training | None:
    """A finished stage's curve and speed; ``None`` without metrics."""
    path = store.out(step) / METRICS_FILE
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    curve = [(e["tokens"], e["loss"]) for e in entries if e.get("loss") is not None]
    if not curve:
        return None
    every = -(-len(curve) // CURVE_POINTS)
    speeds = [e["tokens_per_s"] for e in entries if e.get("tokens_per_s")]
    return Training(
        steps=entries[-1]["step"],
        tokens=entries[-1]["tokens"],
        seconds=float((store.record(step) or {}).get("seconds", 0.0)),
        tokens_per_s=statistics.median(speeds) if speeds else 0.0,
        curve=tuple(curve[::-1][::every][::-1]),
    )


def _attention(spec: CellSpec) -> str:
    """The kind of attention in a row without a head map."""
    if spec.hf_model:
        return "all" if spec.hf_model == TEACHER else "–"
    switches = from_dict(HydraConfig, spec.hydra, "hydra")
    return "all, beside GDN" if switches.fa_window is None else f"window {switches.fa_window}"


def _cell(cell: Cell, plan: Plan, store: StepStore) -> CellResult:
    key = plan.cells[cell.name]
    steps = [plan.steps[k] for k in plan.ancestors(key)]
    last = plan.steps[key]
    training = {
        step.kind: found
        for step in steps
        if step.action == "stage" and store.is_done(step) and (found := _training(step, store))
    }
    maps = [
        store.out(step) / HEAD_MAP
        for step in steps
        if step.action == "select" and store.is_done(step)
    ]
    heads = HeadMap.load(maps[0]).full_attention_heads if maps else None
    records = [(step.kind, record) for step in steps if (record := store.record(step))]
    sources = tuple(sorted({str(record.get("package_source")) for _, record in records}))
    if not store.is_done(last):
        body = unfinished_results(store.out(last))
        accuracy = _accuracy(body)
        made = CellResult(
            cell.variant,
            cell.seed,
            "unfinished" if accuracy else "missing",
            accuracy=accuracy,
            compared=_compared(body),
            fa_heads=heads if accuracy else None,
            attention=_attention(cell.spec) if accuracy and not maps else "",
            training=training,
            sources=sources,
        )
        for step in steps:
            if store.failure(step):
                log = str(store.log(step))
                return dataclasses.replace(made, state="failed", log=log, step=step.kind)
        return made
    body = json.loads((store.out(last) / "results.json").read_text())
    cache = body.get("cache", {})
    return CellResult(
        cell.variant,
        cell.seed,
        "done",
        accuracy=_accuracy(body),
        compared=_compared(body),
        kv_bytes_per_token=cache.get("kv_bytes_per_token"),
        state_bytes=cache.get("state_bytes"),
        fa_heads=heads,
        attention="" if maps else _attention(cell.spec),
        seconds={kind: record.get("seconds", 0.0) for kind, record in records},
        training=training,
        sources=sources,
    )
