"""``run``, ``table``, ``plot`` and ``pack`` of ``tools/experiment.py``."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.executor import run_plan
from megatron_hydra.experiments.pack import pack as pack_results
from megatron_hydra.experiments.page import write_into
from megatron_hydra.experiments.plan import Plan, make_plan
from megatron_hydra.experiments.results import Results, collect
from megatron_hydra.experiments.slurm import from_word, submit
from megatron_hydra.experiments.spec import Cell, Experiment, load_experiment
from megatron_hydra.experiments.store import StepStore
from megatron_hydra.experiments.table import markdown
from megatron_hydra.files import write_json_atomic, write_text_atomic
from megatron_hydra.parallel import platform
from megatron_hydra.stopping import REQUEUE_EXIT_CODE

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """The command line.

    Attributes:
        files: experiment files.
        output: folder of steps and results.
        workers: number of steps at a time; ``None``: one for each GPU, or two without a GPU.
        threads: of each worker.
        gpus: GPUs for the workers, as indices of those that this process sees; ``None``: all.
        stop_after: minutes after which no step starts; ``None``: no limit.
        tokens_scale: factor of every stage's budget in tokens.
        only: rows; empty: all.
        cell: one cell, by its name (:func:`~.slurm.as_word`); empty: all.
        base: file that every file includes instead of the one that it names, or ``None``.
        dry_run: list the steps.
        slurm: options for ``launch/slurm.sh``; ``None``: compute here.
        to: where ``pack`` copies results.
        page: a Markdown file that ``table`` writes its tables into.
    """

    files: Sequence[Path]
    output: Path
    workers: int | None = None
    threads: int = 1
    gpus: Sequence[int] | None = None
    stop_after: float | None = None
    tokens_scale: float = 1.0
    only: Sequence[str] = ()
    cell: str = ""
    base: Path | None = None
    dry_run: bool = False
    slurm: Sequence[str] | None = None
    to: Path | None = None
    page: Path | None = None

    def load(self, path: Path) -> Experiment:
        """Load one of the files."""
        return load_experiment(path, self.base, tokens_scale=self.tokens_scale)


def run(request: Request, say: Say) -> int:
    """Run the missing steps.

    Returns:
        0; 1 if a cell failed; 85 if none failed, and some are not finished because the time has ended.
    """
    began = time.monotonic()
    experiments = [request.load(path) for path in request.files]
    plan = make_plan(_chosen(experiments, request), fetch=not request.dry_run)
    store = StepStore(request.output)
    if request.dry_run:
        _list(plan, store, say)
        return 0
    if request.slurm is not None:
        return submit(plan, store, _words(request), request.slurm, say)
    gpus = gpus_of_workers(plan, request.gpus)
    failures = run_plan(
        plan,
        store,
        request.workers or len(gpus) or 2,
        say,
        threads=request.threads,
        gpus=gpus,
        begin_until=None if request.stop_after is None else began + 60 * request.stop_after,
    )
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
        return 1
    left = sum(not store.is_done(plan.steps[key]) for key in plan.cells.values())
    if left and request.stop_after is not None:
        say(f"the time is over: {left} of {len(plan.cells)} cells are not finished")
        say("the same command resumes from here")
        return REQUEUE_EXIT_CODE
    return 0


def gpus_of_workers(plan: Plan, wanted: Sequence[int] | None) -> list[str]:
    """GPUs for the workers, as values of ``CUDA_VISIBLE_DEVICES``; empty: every worker sees all GPUs.

    Args:
        wanted: indices of the GPUs that this process sees. ``None``: all of them, unless a stage has several
            ranks, which find their GPUs themselves.

    Raises:
        HydraError: a GPU does not exist, or GPUs are given for a stage or an evaluation of several ranks.
    """
    for step in plan.steps.values():
        ranks = step.params.get("processes", step.places.get("processes", 1))
        if ranks > 1:
            if wanted is not None:
                what = "an evaluation" if step.action == "evaluate" else "a stage"
                raise HydraError(
                    f"--gpus gives each worker one GPU, and {what} has {ranks} processes"
                )
            return []
    count = platform.device_count()
    visible = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word][
        :count
    ]
    words = visible if len(visible) == count else [str(number) for number in range(count)]
    if wanted is None:
        return words
    for number in wanted:
        if not 0 <= number < count:
            raise HydraError(f"--gpus {number}: this process sees {count} GPUs, counted from 0")
    return [words[number] for number in wanted]


def show(request: Request, say: Say) -> int:
    """Write tables of the finished cells; returns 1 if cells are missing."""
    store = StepStore(request.output)
    missing = 0
    for path in request.files:
        results = _collected(request.load(path), store)
        write_results(results, store, say)
        if request.page is not None:
            write_into(request.page, results)
            say(f"{request.page}: {results.experiment.name}")
        say("")
        say(markdown(results))
        missing += sum(cell.state != "done" for cell in results.cells)
    return 1 if missing else 0


def draw(request: Request, say: Say) -> int:
    """Plot the finished cells."""
    from megatron_hydra.experiments.plots import draw as draw_results

    store = StepStore(request.output)
    for path in request.files:
        results = _collected(request.load(path), store)
        pictures = draw_results(results, store.root / results.experiment.name)
        if not pictures:
            raise HydraError(
                f"{path}: no cell is finished yet; tools/experiment.py run computes them"
            )
        for picture in pictures:
            say(str(picture))
    return 0


def pack(request: Request, say: Say) -> int:
    """Copy results without weights to ``request.to``."""
    if request.to is None:
        raise HydraError("pack needs --to FOLDER: where the results are copied")
    experiments = [request.load(path) for path in request.files]
    plan = make_plan(_chosen(experiments, request), fetch=False)
    pack_results(experiments, plan, StepStore(request.output), request.to, say)
    return 0


def write_results(results: Results, store: StepStore, say: Say) -> None:
    """Write ``table.md`` and ``results.json`` into the experiment's folder."""
    folder = store.root / results.experiment.name
    folder.mkdir(exist_ok=True)
    write_json_atomic(folder / "results.json", results.to_dict())
    write_text_atomic(folder / "table.md", markdown(results))
    say(str(folder / "table.md"))


def _collected(experiment: Experiment, store: StepStore) -> Results:
    return collect(experiment, make_plan(experiment.cells, fetch=False), store)


def _words(request: Request) -> list[str]:
    """Arguments for a task of an array: the same experiments and the same folder."""
    base = [] if request.base is None else ["--base", str(request.base.resolve())]
    scale = [] if request.tokens_scale == 1 else ["--tokens-scale", str(request.tokens_scale)]
    return [*(str(path.resolve()) for path in request.files), *base, *scale]


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
