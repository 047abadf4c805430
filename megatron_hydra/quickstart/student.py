"""One student of the quickstart, from its initial checkpoint to its evaluation, in one process.

    python -m megatron_hydra.quickstart.student --student hydra --output quickstart --configs DIR

Started by :mod:`megatron_hydra.quickstart.run`, three of them side by side. Every step is the call
that the command of the same name makes; stages follow each other in one process because importing
torch and Megatron costs more than a short stage.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_hydra.arguments import path_argument
from megatron_hydra.errors import HydraError, command
from megatron_hydra.hf.export_files import carries_our_code
from megatron_hydra.quickstart.workspace import STAGES, STUDENTS, Workspace, shipped_teacher
from megatron_hydra.stopping import REQUEUE_EXIT_CODE, Stopped

LENGTH_FACTORS = (1, 2, 4, 8)
CACHE_LENGTH = 512


def stage_config(
    workspace: Workspace, student: str, stage: str, configs: Path, settings: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Config files and ``section.key=value`` overrides of one stage of one student."""
    number = STAGES.index(stage)
    before = workspace.initial(student)
    if number:
        before = workspace.run(student, STAGES[number - 1]) / "checkpoints"
    overrides = [
        f"student.checkpoint={before}",
        f"output={workspace.run(student, stage)}",
        f"data.tokenizer={shipped_teacher()}",
        # Another seed for each stage: a stage must not see the batches of the one before again.
        f"data.seed={1000 * settings['seed'] + number}",
        f"seed={settings['seed']}",
    ]
    if stage != "finetune":
        overrides.append(f"teacher.checkpoint={workspace.teacher}")
    files = [str(configs / "common.yaml"), str(configs / f"{stage}.yaml")]
    return files, overrides + list(settings["overrides"])


def stage_arguments(files: list[str], overrides: list[str]) -> list[str]:
    """The same as arguments of ``python -m megatron_hydra.train``."""
    return [part for file in files for part in ("--config", file)] + overrides


def run_student(
    workspace: Workspace, student: str, configs: Path, settings: dict[str, Any]
) -> None:
    """Align, distill, finetune, export, evaluate; what is finished is skipped."""
    from megatron_hydra.conversion.convert import megatron_to_hf

    for stage in STAGES:
        with workspace.phase(f"{student}_{stage}") as todo:
            if todo:
                _train_stage(workspace, student, stage, configs, settings)
    export = workspace.export(student)
    with workspace.phase(f"{student}_export") as todo:
        if todo or not carries_our_code(export):  # the package may have changed since
            megatron_to_hf(workspace.run(student, STAGES[-1]) / "checkpoints", export, force=True)
    with workspace.phase(f"{student}_evaluate") as todo:
        if todo:
            evaluate_model(workspace, student, export, settings)


def _train_stage(
    workspace: Workspace, student: str, stage: str, configs: Path, settings: dict[str, Any]
) -> None:
    from megatron_hydra import train

    run = workspace.run(student, stage)
    if not can_be_resumed(run):
        shutil.rmtree(run)
    status = train.main(
        stage_arguments(*stage_config(workspace, student, stage, configs, settings))
    )
    if status == REQUEUE_EXIT_CODE:
        raise Stopped
    if status:
        raise HydraError(f"{student}: stage {stage} did not finish, see above")


def can_be_resumed(run: Path) -> bool:
    """Whether training can start in a stage's folder: what a stopped try left is whole, or nothing.

    What is damaged, or was saved without the optimizer, has to be started again.
    """
    from megatron_hydra.training.checkpoint import TRAINING_FILE
    from megatron_hydra.training.run_folder import CHECKPOINTS, find_resume_point

    if not run.exists():
        return True
    try:
        found = find_resume_point(run / CHECKPOINTS, "auto")
    except HydraError:
        return False
    return found is None or bool(json.loads((Path(found) / TRAINING_FILE).read_text())["optimizer"])


def evaluate_model(
    workspace: Workspace, name: str, folder: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """What ``tools/evaluate.py`` does, on the quickstart's task at all lengths."""
    from megatron_hydra.evaluation import EvaluationSettings, evaluate
    from megatron_hydra.hf_loading import find_tokenizer, load_hf_model
    from megatron_hydra.quickstart.tasks import TRAIN_LENGTH, retrieval

    return evaluate(
        load_hf_model(
            folder, trust_remote_code=carries_our_code(folder), dtype="fp32", device="cpu"
        ),
        find_tokenizer(shipped_teacher()),
        [retrieval()],
        [TRAIN_LENGTH * factor for factor in LENGTH_FACTORS],
        EvaluationSettings(
            samples=settings["samples"],
            seed=settings["seed"],
            batch_tokens=8192,
            cache_length=CACHE_LENGTH,
            progress=False,
        ),
        output=workspace.evaluation(name),
        force=True,
        name=name,
    )


@command
def main(argv: list[str] | None = None) -> int:
    """Run one student; everything it does is in the workspace."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", required=True, choices=STUDENTS)
    parser.add_argument(
        "--output", required=True, type=path_argument, help="the quickstart's folder"
    )
    parser.add_argument(
        "--configs", required=True, type=path_argument, help="folder of the stages' configs"
    )
    args = parser.parse_args(argv)
    settings = json.loads((args.output / "settings.json").read_text())
    run_student(Workspace(args.output), args.student, args.configs, settings)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
