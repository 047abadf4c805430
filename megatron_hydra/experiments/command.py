"""``run``, ``table`` and ``plot`` of ``tools/experiment.py``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_hydra.checkpoint.atomic import write_text_atomic
from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.executor import run_plan
from megatron_hydra.experiments.plan import Plan, make_plan
from megatron_hydra.experiments.results import Results, collect
from megatron_hydra.experiments.slurm import from_word, submit
from megatron_hydra.experiments.spec import Cell, Experiment, load_experiment
from megatron_hydra.experiments.store import StepStore
from megatron_hydra.experiments.table import markdown

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """The command line.

    Attributes:
        files: experiment files.
        output: folder of steps and results.
        workers, threads: steps at a time, and threads of each.
        only: rows; empty: all.
        cell: one cell, by its name (:func:`~.slurm.as_word`); empty: all.
        base: included by every file in place of what it names, or ``None``.
        dry_run: list the steps.
        slurm: options for ``launch/slurm.sh``, or ``None``: compute here.
    """

    files: Sequence[Path]
    output: Path
    workers: int = 2
    threads: int = 1
    only: Sequence[str] = ()
    cell: str = ""
    base: Path | None = None
    dry_run: bool = False
    slurm: Sequence[str] | None = None


def run(request: Request, say: Say) -> int:
    """Compute what is missing; 1 if a cell failed."""
    experiments = [load_experiment(path, request.base) for path in request.files]
    plan = make_plan(_chosen(experiments, request), fetch=not request.dry_run)
    store = StepStore(request.output)
    if request.dry_run:
        _list(plan, store, say)
        return 0
    if request.slurm is not None:
        return submit(plan, store, _words(request), request.slurm, say)
    failures = run_plan(plan, store, request.workers, say, threads=request.threads)
    if not request.cell and not request.only:
        for experiment in experiments:
            write_results(_collected(experiment, store), store, say)
    affected = 0
    for name, key in plan.cells.items():
        ancestors = set(plan.ancestors(key))
        for failure in failures:
            if failure.step.key in ancestors:
                affected += 1
                say(f"failed: {name}: {failure.step.kind}: {failure.message}")
                say(f"        log: {store.log(failure.step)}")
                break
    if affected:
        say(f"{affected} of {len(plan.cells)} cells failed; the same command tries them again")
    return 1 if affected else 0


def show(request: Request, say: Say) -> int:
    """Tables of what is finished; 1 if cells are missing."""
    store = StepStore(request.output)
    missing = 0
    for path in request.files:
        results = _collected(load_experiment(path, request.base), store)
        write_results(results, store, say)
        say("")
        say(markdown(results))
        missing += sum(cell.state != "done" for cell in results.cells)
    return 1 if missing else 0


def draw(request: Request, say: Say) -> int:
    """Pictures of what is finished."""
    from megatron_hydra.experiments.plots import draw as draw_results

    store = StepStore(request.output)
    for path in request.files:
        results = _collected(load_experiment(path, request.base), store)
        pictures = draw_results(results, store.root / results.experiment.name)
        if not pictures:
            raise HydraError(
                f"{path}: no cell is finished yet; tools/experiment.py run computes them"
            )
        for picture in pictures:
            say(str(picture))
    return 0


def write_results(results: Results, store: StepStore, say: Say) -> None:
    """``table.md`` and ``results.json`` in the experiment's folder."""
    folder = store.root / results.experiment.name
    folder.mkdir(exist_ok=True)
    write_text_atomic(folder / "results.json", json.dumps(results.to_dict(), indent=1) + "\n")
    write_text_atomic(folder / "table.md", markdown(results))
    say(str(folder / "table.md"))


def _collected(experiment: Experiment, store: StepStore) -> Results:
    return collect(experiment, make_plan(experiment.cells, fetch=False), store)


def _words(request: Request) -> list[str]:
    """What a task of an array reads: the same experiments, into the same folder."""
    base = [] if request.base is None else ["--base", str(request.base.resolve())]
    return [*(str(path.resolve()) for path in request.files), *base]


def _chosen(experiments: Sequence[Experiment], request: Request) -> list[Cell]:
    cells = [cell for experiment in experiments for cell in experiment.cells]
    if request.cell:
        wanted = from_word(request.cell)
        found = [cell for cell in cells if cell.name == wanted]
        if not found:
            raise HydraError(f"--cell: the experiment files have no cell {wanted!r} any more")
        return found
    known = {cell.variant for cell in cells}
    for name in request.only:
        if name not in known:
            raise HydraError(f"--only {name}: no such row; there are {', '.join(sorted(known))}")
    return [cell for cell in cells if not request.only or cell.variant in request.only]


def _list(plan: Plan, store: StepStore, say: Say) -> None:
    needed = dict.fromkeys(plan.steps, 0)
    for key in plan.cells.values():
        for other in plan.ancestors(key):
            needed[other] += 1
    for key, step in plan.steps.items():
        state = "finished" if store.is_done(step) else "failed" if store.failure(step) else "to do"
        shared = f" (and {needed[key] - 1} more cells)" if needed[key] > 1 else ""
        say(f"{state:8s} {step.kind}-{key}  {step.title}{shared}")
    alone = sum(needed.values())
    say(f"{len(plan.steps)} steps for {len(plan.cells)} cells; without sharing: {alone}")
