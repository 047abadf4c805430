"""One student of the quickstart, from its initial checkpoint to its evaluation, in one process.

    python -m megatron_hydra.quickstart.student --student hydra --output quickstart --configs DIR

Started by :mod:`megatron_hydra.quickstart.run`, three of them side by side. Every step is the call
that the command of the same name makes; stages follow each other in one process because importing
torch and Megatron costs more than a short stage.
"""

from __future__ import annotations

import argparse
import filecmp
import json
from pathlib import Path
from typing import Any

from megatron_hydra.errors import HydraError, command
from megatron_hydra.quickstart.workspace import STAGES, STUDENTS, Workspace, shipped_teacher

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
    from megatron_hydra import train
    from megatron_hydra.checkpoint.convert import megatron_to_hf

    for stage in STAGES:
        with workspace.phase(f"{student}_{stage}") as todo:
            config = stage_config(workspace, student, stage, configs, settings)
            if todo and train.main(stage_arguments(*config)) != 0:
                raise HydraError(f"{student}: stage {stage} did not finish, see above")
    with workspace.phase(f"{student}_export") as todo:
        if todo:
            trained = workspace.run(student, STAGES[-1]) / "checkpoints"
            megatron_to_hf(trained, workspace.export(student), force=True)
    with workspace.phase(f"{student}_evaluate") as todo:
        if todo:
            evaluate_model(workspace, student, workspace.export(student), settings)


def evaluate_model(
    workspace: Workspace, name: str, folder: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """What ``tools/evaluate.py`` does, on the quickstart's task at all lengths."""
    from megatron_hydra.evaluation import EvaluationSettings, evaluate
    from megatron_hydra.evaluation.loading import load_model, load_tokenizer
    from megatron_hydra.quickstart.tasks import TRAIN_LENGTH, retrieval

    return evaluate(
        load_model(folder, trust_remote_code=carries_our_code(folder), dtype="fp32", device="cpu"),
        load_tokenizer(shipped_teacher()),
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


def carries_our_code(folder: Path) -> bool:
    """Whether the Python files of an export are this package's own, byte for byte."""
    from megatron_hydra.hf.export_files import hf_export_files

    ours = hf_export_files()
    found = {path.name: path for path in folder.glob("*.py")}
    return bool(found) and all(
        name in ours and filecmp.cmp(path, ours[name], shallow=False)
        for name, path in found.items()
    )


@command
def main(argv: list[str] | None = None) -> int:
    """Run one student; everything it does is in the workspace."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", required=True, choices=STUDENTS)
    parser.add_argument("--output", required=True, type=Path, help="the quickstart's folder")
    parser.add_argument("--configs", required=True, type=Path, help="folder of the stages' configs")
    args = parser.parse_args(argv)
    settings = json.loads((args.output / "settings.json").read_text())
    run_student(Workspace(args.output), args.student, args.configs, settings)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
