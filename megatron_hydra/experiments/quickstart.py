"""The quickstart: ``configs/quickstart/quickstart.yaml`` on the engine of all experiments, and its page.

Three students get the same training in parallel: HydraHead with the selected heads, and two controls, one with
random heads at the same ratio and one without full-attention heads.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.actions import HEAD_MAP
from megatron_hydra.experiments.executor import run_plan
from megatron_hydra.experiments.plan import PREPARED, Plan, make_plan
from megatron_hydra.experiments.quickstart_page import PAGE_FILES, write_page
from megatron_hydra.experiments.results import collect
from megatron_hydra.experiments.spec import Cell, Experiment, load_experiment
from megatron_hydra.experiments.store import StepStore
from megatron_hydra.files import write_text_atomic

RECIPE = "quickstart.yaml"
STUDENT = "hydra"
"""The row whose steps ``commands.sh`` lists."""
_COMMANDS = "commands.sh"
_WORKERS = 3
"""One worker with one thread for each student: on two cores, no core is idle while one worker loads a model."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Changes of the command line to the recipe.

    Attributes:
        seed: of the selection's prompts, the random heads, the order of decays, the training data
            and the evaluation's samples.
        samples: sequences of each evaluation cell, each with several answers; 0: the recipe's number.
        overrides: ``section.key=value`` for every stage of training.
    """

    seed: int = 0
    samples: int = 0
    overrides: tuple[str, ...] = ()


def run_quickstart(
    output: Path,
    configs: Path,
    settings: Settings,
    *,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compute the missing steps, and write the results.

    Args:
        output: the folder for everything, an ordinary folder of experiments.
        configs: the folder with ``quickstart.yaml`` and the configs that it names.
        settings: of this run; steps of runs with other settings stay in ``output`` and are reused by them.
        fresh: whether to compute all steps of these settings again.
        say: prints a line for the user.

    Returns:
        The content of ``metrics.json``.

    Raises:
        HydraError: ``output`` has other contents, a config is wrong, or a step failed; names its log.
        Stopped: on a signal or Ctrl-C.
    """
    started = time.monotonic()
    experiment = load_recipe(configs, settings)
    plan = make_plan(experiment.cells)
    store = StepStore(output)
    if fresh:
        store.discard(plan.steps.values())
        for name in (*PAGE_FILES, _COMMANDS):
            (store.root / name).unlink(missing_ok=True)
    say("a tiny Qwen3 becomes a HydraHead: about 5 minutes on two CPU cores")
    if failures := run_plan(plan, store, _WORKERS, say):
        step = failures[0].step
        raise HydraError(f"{step.title}: {failures[0].message}; its log is {store.log(step)}")
    write_text_atomic(store.root / _COMMANDS, commands_by_hand(experiment, plan, store))
    metrics = write_page(collect(experiment, plan, store), plan, store, say)
    say(f"finished in {time.monotonic() - started:.0f} s; everything is in {store.root}")
    return metrics


def load_recipe(configs: Path, settings: Settings) -> Experiment:
    """The experiment of ``configs`` with these settings.

    Raises:
        HydraError: the recipe is missing or wrong, or an override has a wrong form.
    """
    path = configs / RECIPE
    if not path.is_file():
        raise HydraError(
            f"--configs {configs} has no {RECIPE}; copy configs/quickstart and edit it"
        )
    changes: dict[str, Any] = {}
    for override in settings.overrides:
        key, equals, value = override.partition("=")
        if not (key and equals):
            raise HydraError(f"--set {override!r} is not of the form section.key=value")
        changes[key] = value
    stages = {name for cell in load_experiment(path).cells for name, _ in cell.stages}
    base: dict[str, Any] = {"stages": {name: {"set": changes} for name in stages}}
    if settings.samples:
        base["evaluation"] = {"samples": settings.samples}
    return load_experiment(path, changes={"seeds": [settings.seed], "base": base})


def student_of(experiment: Experiment) -> Cell:
    """The cell of HydraHead with its selected heads.

    Raises:
        HydraError: the recipe has no such row.
    """
    for cell in experiment.cells:
        if cell.variant == STUDENT:
            return cell
    raise HydraError(f"{RECIPE} has no row {STUDENT!r}: the quickstart is about it")


def commands_by_hand(experiment: Experiment, plan: Plan, store: StepStore) -> str:
    """HydraHead's steps of the chain as shell commands, for users who want to run them one by one."""
    cell = student_of(experiment)
    steps = {plan.steps[key].kind: plan.steps[key] for key in plan.ancestors(plan.cells[cell.name])}
    out = {kind: store.out(step) for kind, step in steps.items()}
    teacher = steps["select"].places.get("teacher_hf") or out["train_teacher"]
    selection, evaluation = cell.spec.selection, cell.spec.evaluation

    def placed(name: str) -> str:
        return name.replace(PREPARED, str(out["prepare"]))

    head_map, exported = out["select"] / HEAD_MAP, out["export"]
    commands: list[list[Any]] = [
        ["tools/select_heads.py", "--hf-path", teacher, "--ratio", selection.ratio]
        + ["--strategy", selection.strategy, "--seed", cell.seed]
        + ["--num-prompts", selection.num_prompts, "--min-prompts", selection.min_prompts]
        + ["--tasks", ",".join(map(placed, selection.tasks)), "--output", head_map],
        ["tools/hf_to_megatron.py", "--hf-path", teacher, "--output", out["teacher"]],
        ["tools/hf_to_megatron.py", "--hf-path", teacher, "--output", out["convert"]]
        + ["--head-map", head_map, "--seed", cell.seed]
        + ["--calibration-file", placed(cell.spec.student.calibration_file)],
    ]
    trained = out["convert"]
    for name, stage in cell.stages:
        step = steps[name]
        words = [word for file in stage.configs for word in ("--config", file)]
        words += [f"student.checkpoint={trained}", f"output={out[name]}"]
        words += [f"data.tokenizer={teacher}", f"seed={cell.seed}"]
        words += [f"data.seed={step.params['config']['data']['seed']}"]
        if "teacher" in step.inputs:
            words += [f"teacher.checkpoint={out['teacher']}"]
        words += [f"{key}={value}" for key, value in stage.set.items()]
        commands.append(["-m", "megatron_hydra.train", *words])
        trained = out[name] / "checkpoints"
    commands += [
        ["tools/megatron_to_hf.py", "--output", exported, "--checkpoint", trained],
        ["tools/evaluate.py", "--model", exported, "--trust-remote-code"]
        + ["--tasks", ",".join(evaluation.tasks)]
        + ["--lengths", ",".join(map(str, evaluation.lengths))]
        + ["--samples", evaluation.samples, "--seed", cell.seed]
        + ["--output", out["evaluate"]],
    ]
    lines = [
        "# What the quickstart did for HydraHead, as commands; run them in the repository's root,",
        f"# with other output folders. The prompts were made by {cell.spec.prepare.function}.",
        *(shlex.join(["python", *map(str, words)]) for words in commands),
    ]
    return "\n".join(lines) + "\n"
