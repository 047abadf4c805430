"""Actions of the steps: each one makes the same call as the corresponding command."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_hydra.config.evaluation import EvaluationOptions
from megatron_hydra.config.loading import from_dict, to_yaml
from megatron_hydra.config.selection import SelectionOptions
from megatron_hydra.config.student import StudentStart
from megatron_hydra.errors import HydraError
from megatron_hydra.experiments import fingerprint
from megatron_hydra.experiments.plan import PREPARED, Step
from megatron_hydra.experiments.spec import EvaluationSpec, SelectionSpec
from megatron_hydra.files import write_text_atomic
from megatron_hydra.head_map import HeadMap
from megatron_hydra.options import flags, keys, values, worded
from megatron_hydra.stopping import REQUEUE_EXIT_CODE, Stopped, stop_requested

HEAD_MAP = "head_map.json"


@dataclasses.dataclass(frozen=True)
class Context:
    """Arguments of an action.

    Attributes:
        step: the step to compute.
        out: the folder that the action makes.
        inputs: name → ``out`` of the steps it reads.
    """

    step: Step
    out: Path
    inputs: dict[str, Path]

    @property
    def teacher_hf(self) -> Path:
        """The dense model's Hugging Face folder."""
        return self.inputs.get("teacher_hf") or Path(self.step.places["teacher_hf"])

    def place(self, name: str) -> str:
        """A file name, with the prepared folder inserted."""
        return name.replace(PREPARED, str(self.inputs["prepare"])) if PREPARED in name else name


def train_teacher(context: Context) -> None:
    """Train a dense model in a process of its own."""
    params = context.step.params
    words = [word.replace("{seed}", str(params.get("seed", ""))) for word in params["arguments"]]
    shutil.rmtree(context.out, ignore_errors=True)
    _run([sys.executable, "-m", params["module"], *words, "--output", str(context.out)])


def prepare(context: Context) -> None:
    """Call the experiment's own function."""
    params = context.step.params
    module, colon, name = params["function"].partition(":")
    if not colon:
        raise HydraError(f"prepare.function {params['function']!r}: write module:function")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise HydraError(f"prepare.function {params['function']!r}: {error}") from None
    shutil.rmtree(context.out, ignore_errors=True)
    context.out.mkdir(parents=True)
    function(context.out, context.teacher_hf, params["seed"], **params["options"])


def teacher(context: Context) -> None:
    """The dense model as a Megatron checkpoint."""
    from megatron_hydra.conversion.convert import hf_to_megatron

    hf_to_megatron(context.teacher_hf, context.out, force=True)


def select(context: Context) -> None:
    """Head selection: the map, with its pictures beside it."""
    from megatron_hydra.selection.plots import draw_head_map

    context.out.mkdir(parents=True, exist_ok=True)
    given = context.step.places.get("head_map")
    chosen = _take_head_map(context, Path(given)) if given else _choose_heads(context)
    draw_head_map(chosen, (context.out / HEAD_MAP).with_suffix(""))


def _choose_heads(context: Context) -> HeadMap:
    from megatron_hydra.selection import select_heads

    params, places = context.step.params, context.step.places
    given = params["selection"] | {
        "tasks": [context.place(task) for task in places["tasks"]],
        "text": context.place(places.get("text", "")),
        "compare": places.get("compare", []),
    }
    spec = from_dict(SelectionSpec, given, "selection")
    with worded(keys(SelectionOptions, "selection")):
        return select_heads(
            context.teacher_hf,
            ratio=spec.ratio,
            strategy=spec.strategy,
            seed=params.get("seed", 0),
            options=SelectionOptions(**values(SelectionOptions, spec)),
            work_folder=context.out / "work",
            tasks=spec.tasks or None,
            output=context.out / HEAD_MAP,
        )


def _take_head_map(context: Context, source: Path) -> HeadMap:
    """Load an existing head map; check that it fits the teacher and has not changed since planning."""
    from megatron_hydra.hf_identity import model_identity_from_hf

    if fingerprint.of_file(source) != context.step.params["head_map"]:
        raise HydraError(f"{source} has changed since this run was planned; run the command again")
    head_map = HeadMap.load(source)
    head_map.check_model(model_identity_from_hf(context.teacher_hf), str(source))
    shutil.copyfile(source, context.out / HEAD_MAP)
    return head_map


def convert(context: Context) -> None:
    """The student before training."""
    from megatron_hydra.config.model import HydraConfig, stored_switches
    from megatron_hydra.conversion.convert import StudentOptions, hf_to_megatron

    params = context.step.params
    calibration = context.place(context.step.places["calibration_file"])
    start = from_dict(
        StudentStart, params["student"] | {"calibration_file": calibration}, "student"
    )
    selection = context.inputs.get("head_map")
    options = StudentOptions(
        None if selection is None else selection / HEAD_MAP,
        hydra=from_dict(HydraConfig, stored_switches(params["hydra"]), "hydra"),
        seed=params["seed"],
        **values(StudentStart, start),
    )
    hf_to_megatron(context.teacher_hf, context.out, options, force=True)


def stage(context: Context) -> None:
    """One stage of training; resumes from its own checkpoints if it was stopped."""
    from megatron_hydra.config.run import RunConfig, SourceConfig

    config = from_dict(RunConfig, context.step.params["config"], context.step.kind)
    places = context.step.places

    def placed(blend: tuple[SourceConfig, ...], name: str) -> tuple[SourceConfig, ...]:
        return tuple(
            dataclasses.replace(part, path=places["data"].get(f"{name}{n}", ""))
            for n, part in enumerate(blend)
        )

    data = dataclasses.replace(
        config.data,
        blend=placed(config.data.blend, ""),
        cache_dir=places["cache_dir"],
        tokenizer=str(context.teacher_hf),
    )
    config = dataclasses.replace(
        config,
        output=str(context.out),
        student=dataclasses.replace(
            config.student, checkpoint=str(_checkpoint(context, "student"))
        ),
        teacher=dataclasses.replace(
            config.teacher,
            checkpoint=str(context.inputs["teacher"]) if "teacher" in context.inputs else "",
        ),
        data=data,
        validation=dataclasses.replace(
            config.validation, blend=placed(config.validation.blend, "validation.")
        ),
    )
    processes = context.step.params["processes"]
    if processes == 1:
        from megatron_hydra.training.loop import run_training

        status = run_training(config)
        if status == REQUEUE_EXIT_CODE:
            raise Stopped
        if status:
            raise HydraError(f"the stage ended with exit status {status}")
        return
    file = context.out.parent / "config.yaml"
    write_text_atomic(file, to_yaml(config))
    launcher = Path(__file__).resolve().parents[2] / "launch" / "local.sh"
    _run(["bash", str(launcher), "--procs-per-node", str(processes), str(file)])


def export(context: Context) -> None:
    """The trained student in Hugging Face format."""
    from megatron_hydra.conversion.convert import megatron_to_hf

    megatron_to_hf(_checkpoint(context, "student"), context.out, force=True)


def evaluate(context: Context) -> None:
    """Score a model; reuses finished (task, length) pairs of a stopped try."""
    from megatron_hydra.evaluation import EvaluationSettings
    from megatron_hydra.evaluation import evaluate as run_evaluation
    from megatron_hydra.hf.export_files import carries_our_code
    from megatron_hydra.hf_loading import find_tokenizer, load_hf_model

    params, places = context.step.params, context.step.places
    given = params["evaluation"] | {
        "tasks": [context.place(task) for task in places["tasks"]],
        "haystack": Path(places["haystack"]).read_text() if places["haystack"] else "",
        "lm_eval_include": places.get("lm_eval_include", ""),
    }
    spec = from_dict(EvaluationSpec, given, "evaluation")
    folder = context.inputs.get("model") or Path(places["model"])
    if "model" in context.inputs:
        _renew_code(folder)
    trust = spec.trust_remote_code or carries_our_code(folder)
    if places.get("processes", 1) > 1 and spec.tasks:
        _score_in_processes(context, spec, folder, trust)  # the cells; the rest follows here
    with worded(keys(EvaluationOptions, "evaluation")):
        run_evaluation(
            load_hf_model(
                folder,
                trust_remote_code=trust,
                dtype=spec.dtype,
                device=spec.device,
                changes=spec.model_config,
            ),
            find_tokenizer(folder, trust_remote_code=trust),
            spec.tasks,
            spec.lengths,
            EvaluationSettings(
                **values(EvaluationOptions, spec), seed=params["seed"], progress=False
            ),
            output=context.out,
            name=context.step.title,
        )


def _score_in_processes(context: Context, spec: EvaluationSpec, folder: Path, trust: bool) -> None:
    """Compute the evaluation's cells by ``tools/evaluate.py`` in several processes."""
    root = Path(__file__).resolve().parents[2]
    places = context.step.places
    words = [
        sys.executable, str(root / "launch/agent.py"), "--nnodes", "1", "--standalone",
        "--nproc-per-node", str(places["processes"]), str(root / "tools/evaluate.py"),
        "--model", str(folder), "--output", str(context.out), "--quiet",
        "--tasks", _listed(spec.tasks), "--lengths", _listed(spec.lengths),
        "--seed", str(context.step.params["seed"]), "--dtype", spec.dtype, "--device", spec.device,
        "--model-config", json.dumps(spec.model_config),
    ]  # fmt: skip
    here = {"haystack": places["haystack"], "cache_length": 0, "lm_eval": (), "lm_eval_include": ""}
    options = values(EvaluationOptions, spec) | here
    for name, flag in flags(EvaluationOptions).items():
        value = options[name]
        if value not in (None, "", ()):
            words += [flag, _listed(value) if isinstance(value, tuple) else str(value)]
    if trust:
        words.append("--trust-remote-code")
    _run(words)


def _listed(items: Iterable[Any]) -> str:
    return ",".join(map(str, items))


def _renew_code(folder: Path) -> None:
    """Replace the model code of an exported student by the package's current code.

    The code beside the weights is from an earlier version or another author; neither runs.
    """
    from megatron_hydra.hf.export_files import carries_our_code, hf_export_files

    if any(folder.glob("*.py")) and not carries_our_code(folder):  # a trained teacher has none
        for name, path in hf_export_files().items():
            write_text_atomic(folder / name, path.read_text(encoding="utf-8"))


def _checkpoint(context: Context, name: str) -> Path:
    """The checkpoint of a student: a converted student is one; a stage's is in its run folder."""
    folder = context.inputs[name]
    return folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder


def _run(command: list[str]) -> None:
    """Run a command; a request to stop this process is forwarded to it.

    Raises:
        Stopped: the command was stopped.
        HydraError: it failed.
    """
    process = subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    stopped = False
    while (status := _status(process)) is None:
        if stop_requested() and not stopped:
            process.terminate()
            stopped = True
    if status == REQUEUE_EXIT_CODE or (status and stop_requested()):
        raise Stopped
    if status:
        raise HydraError(f"{' '.join(command)} ended with exit status {status}")


def _status(process: subprocess.Popen[bytes]) -> int | None:
    """Exit status of a process that ends within half a second."""
    try:
        return process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return None


ACTIONS: dict[str, Callable[[Context], Any]] = {
    "train_teacher": train_teacher,
    "prepare": prepare,
    "teacher": teacher,
    "select": select,
    "convert": convert,
    "stage": stage,
    "export": export,
    "evaluate": evaluate,
}
