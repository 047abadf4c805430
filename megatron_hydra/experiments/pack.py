"""Copy results without weights: the same folder layout, small enough to send or to archive."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.plan import Plan, Step
from megatron_hydra.experiments.spec import Experiment
from megatron_hydra.experiments.store import WITHOUT_WEIGHTS, StepStore

_WEIGHTS_ALONE = ("train_teacher", "teacher", "convert", "export")
"""Actions that make only a model."""
_LEFT_OUT = {"stage": ("checkpoints", ".packs"), "select": ("work",)}
"""Folders of other actions' outputs that are not copied."""


def pack(
    experiments: Sequence[Experiment],
    plan: Plan,
    store: StepStore,
    target: Path,
    say: Callable[[str], None],
) -> None:
    """Copy records, logs, head maps, metrics and scores of the plan's steps to another folder.

    The copy is a complete folder of experiments: ``table`` and ``plot`` read it, and ``run`` resumes from it.
    Then only weights that an unfinished step reads are computed again. Packing into a folder with results adds
    to them.

    Raises:
        HydraError: the target is the store's own folder, or has other contents.
    """
    if target.resolve() == store.root:
        raise HydraError(f"--to {target} is the --output itself: give another folder")
    copy = StepStore(target)
    count = 0
    for step in plan.steps.values():
        if store.folder(step).is_dir() and not copy.is_whole(step):
            _copy_step(step, store, copy)
            count += 1
    for experiment in experiments:
        pages = store.root / experiment.name
        if pages.is_dir():
            shutil.copytree(pages, copy.root / experiment.name, dirs_exist_ok=True)
    size = sum(path.stat().st_size for path in copy.root.rglob("*") if path.is_file())
    say(f"{count} of {len(plan.steps)} steps into {target}, {size / 1e6:.1f} MB in all")


def _copy_step(step: Step, store: StepStore, copy: StepStore) -> None:
    """Copy one step; its record comes last, so that a stopped copy does not count as finished."""
    folder = copy.folder(step)
    folder.mkdir(parents=True, exist_ok=True)
    has_weights = step.action in _WEIGHTS_ALONE or step.action == "stage"
    if has_weights:
        (folder / WITHOUT_WEIGHTS).touch()
    # A stopped stage cannot resume without its checkpoints; a stopped evaluation can.
    keeps = step.action not in _WEIGHTS_ALONE and (store.is_done(step) or not has_weights)
    if store.out(step).is_dir() and keeps:
        ignored = shutil.ignore_patterns(*_LEFT_OUT.get(step.action, ()))
        shutil.copytree(store.out(step), copy.out(step), ignore=ignored, dirs_exist_ok=True)
    for name in ("log.txt", "failed.json", "stopped.json", "record.json"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(store.folder(step) / name, folder / name)
