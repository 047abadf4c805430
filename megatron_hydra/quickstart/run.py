"""The quickstart: every arrow of design §1 on the shipped teacher, on a CPU, in minutes.

    model ─ select heads ─> head maps ─ convert ─> checkpoints ─ 3 stages ─> exports ─> evaluation

Three students go through the same training side by side: HydraHead with the selected heads, and
two controls, random heads at the same ratio and no full-attention head at all.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hydra.checkpoint.atomic import write_text_atomic
from megatron_hydra.config.loading import load_run_config
from megatron_hydra.errors import HydraError
from megatron_hydra.quickstart.progress import TrainingProgress
from megatron_hydra.quickstart.student import evaluate_model, stage_arguments, stage_config
from megatron_hydra.quickstart.workspace import STAGES, STUDENTS, Workspace, shipped_teacher

RATIO = "7:1"
_POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the results.

    Attributes:
        seed: of the selection's prompts, the random heads, the order of decays, the training data
            and the evaluation's samples.
        prompts: prompts for the head selection.
        samples: sequences of each evaluation cell; every one has several answers.
        overrides: ``section.key=value`` for every stage of training.
    """

    seed: int = 0
    prompts: int = 32
    samples: int = 32
    overrides: tuple[str, ...] = ()


def run_quickstart(
    output: Path,
    configs: Path,
    settings: Settings,
    *,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run what is not finished yet, and write the results.

    Args:
        output: the folder for everything.
        configs: the folder with ``common.yaml`` and one file a stage.
        settings: a run goes on only with the settings that it was begun with.
        fresh: throw away an earlier run in ``output``.
        say: prints a line for the user.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        HydraError: ``output`` holds something else, a config is wrong, or a student failed; its log
            is named.
    """
    from megatron_hydra.quickstart.report import write_report

    _check_configs(configs)
    _keep_libraries_quiet()
    workspace = Workspace(output)
    body = {**dataclasses.asdict(settings), "overrides": list(settings.overrides)}
    workspace.open(body, fresh)
    started = time.monotonic()
    say("a tiny Qwen3 becomes a HydraHead: about 5 minutes on two CPU cores")
    steps: list[tuple[str, str, Callable[[], None]]] = [
        ("select", f"head selection at {RATIO}", lambda: _select(workspace, settings)),
        ("convert", "teacher and students to Megatron", lambda: _convert(workspace, settings)),
        ("train", "three students", lambda: _train(workspace, configs, body, say)),
        (
            "teacher_evaluate",
            "evaluation of the teacher",
            lambda: _discard(evaluate_model(workspace, "teacher", shipped_teacher(), body)),
        ),
    ]
    for number, (name, title, action) in enumerate(steps, 1):
        head = f"[{number}/{len(steps)}] {title}"
        with workspace.phase(name) as todo:
            if not todo:
                say(f"{head}: done before")
                continue
            say(head)
            begun = time.monotonic()
            action()
        say(f"      {time.monotonic() - begun:.0f} s")
    write_text_atomic(output / "commands.sh", commands_by_hand(workspace, configs, body))
    metrics = write_report(workspace, body, RATIO, say)
    say(f"finished in {time.monotonic() - started:.0f} s; everything is in {output}")
    return metrics


def _discard(_: Any) -> None:
    """For actions whose result is in a file."""


def _keep_libraries_quiet() -> None:
    """Hints about missing GPU libraries and loading bars hide what the user should see."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _check_configs(configs: Path) -> None:
    for name in ("common", *STAGES):
        if not (configs / f"{name}.yaml").is_file():
            raise HydraError(f"--configs {configs} has no {name}.yaml")


# -- head selection and conversion ----------------------------------------------------------------


def _select(workspace: Workspace, settings: Settings) -> None:
    """Head maps of the three students, and the pictures of the selected one."""
    from megatron_hydra.evaluation.loading import load_tokenizer
    from megatron_hydra.quickstart.tasks import write_calibration, write_selection_prompts
    from megatron_hydra.selection import SelectionOptions, select_heads
    from megatron_hydra.selection.plots import draw_head_map

    teacher, seed = shipped_teacher(), settings.seed
    tokenizer = load_tokenizer(teacher)
    write_selection_prompts(workspace.prompts, tokenizer, settings.prompts, seed)
    write_calibration(workspace.calibration, tokenizer, seed)
    chosen = select_heads(
        teacher,
        ratio=RATIO,
        strategy="interp",
        tasks=[f"jsonl:{workspace.prompts}"],
        seed=seed,
        options=SelectionOptions(
            num_prompts=settings.prompts,
            min_prompts=max(1, settings.prompts // 2),
            attribution=False,
        ),
        show_progress=sys.stderr.isatty(),
    )
    chosen.save(workspace.head_map("hydra"))
    draw_head_map(chosen, workspace.root / "head_maps" / "hydra")
    shutil.copyfile(
        workspace.root / "head_maps" / "hydra_unified.png", workspace.root / "head_importance.png"
    )
    drawn = select_heads(teacher, ratio=RATIO, strategy="random", seed=seed)
    drawn.save(workspace.head_map("random"))
    select_heads(teacher, ratio="all-gdn", strategy="uniform").save(workspace.head_map("all_gdn"))


def _convert(workspace: Workspace, settings: Settings) -> None:
    """What ``tools/hf_to_megatron.py`` does, four times."""
    from megatron_hydra.checkpoint.convert import StudentOptions, hf_to_megatron

    teacher = shipped_teacher()
    hf_to_megatron(teacher, workspace.teacher, force=True)
    for student in STUDENTS:
        options = StudentOptions(
            workspace.head_map(student), seed=settings.seed, calibration_file=workspace.calibration
        )
        hf_to_megatron(teacher, workspace.initial(student), options, force=True)


# -- training ------------------------------------------------------------------------------------


def _train(
    workspace: Workspace, configs: Path, settings: dict[str, Any], say: Callable[[str], None]
) -> None:
    """All students at once, each a process with one thread; shows how far they are."""
    progress = TrainingProgress(workspace, _steps(workspace, configs, settings), say)
    waiting = [s for s in STUDENTS if not workspace.is_done(f"{s}_evaluate")]
    processes = {student: _start(workspace, student, configs) for student in waiting}
    try:
        while any(process.poll() is None for process in processes.values()):
            for student, process in processes.items():
                if process.poll():
                    raise HydraError(_failure(workspace, student, process.returncode))
            progress.show()
            time.sleep(_POLL_SECONDS)
        for student, process in processes.items():
            if process.returncode:
                raise HydraError(_failure(workspace, student, process.returncode))
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
                process.wait()
        progress.close()


def _start(workspace: Workspace, student: str, configs: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megatron_hydra.quickstart.student"]
    command += ["--student", student, "--output", str(workspace.root), "--configs", str(configs)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",  # three processes on two cores: more threads only get in the way
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    with open(workspace.log(student), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _failure(workspace: Workspace, student: str, code: int) -> str:
    lines = workspace.log(student).read_text(errors="replace").splitlines()
    tail = "\n".join(lines[-15:])
    return (
        f"student {student} ended with exit status {code}; {workspace.log(student)} ends:\n{tail}"
    )


def _steps(workspace: Workspace, configs: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Stage → optimizer steps, read as the trainer reads them, so that a bad config fails here."""
    return {
        stage: load_run_config(
            *stage_config(workspace, STUDENTS[0], stage, configs, settings)
        ).schedule.steps
        for stage in STAGES
    }


def commands_by_hand(workspace: Workspace, configs: Path, settings: dict[str, Any]) -> str:
    """HydraHead's way through the chain as shell commands, for who wants to go it alone."""
    teacher, seed, student = shipped_teacher(), settings["seed"], STUDENTS[0]
    lines = [
        "# What the quickstart did for HydraHead, as commands; run them in the repository's root,",
        "# with other output folders. The prompts were made by",
        "# megatron_hydra.quickstart.tasks.write_selection_prompts.",
        f"python tools/select_heads.py --hf-path {teacher} --ratio {RATIO} --seed {seed} "
        f"--num-prompts {settings['prompts']} --no-attribution --tasks jsonl:{workspace.prompts} "
        f"--output {workspace.head_map(student)}",
        f"python tools/hf_to_megatron.py --hf-path {teacher} --output {workspace.teacher}",
        f"python tools/hf_to_megatron.py --hf-path {teacher} --output {workspace.initial(student)} "
        f"--head-map {workspace.head_map(student)} --seed {seed} "
        f"--calibration-file {workspace.calibration}",
    ]
    for stage in STAGES:
        arguments = stage_arguments(*stage_config(workspace, student, stage, configs, settings))
        lines.append(shlex.join(["python", "-m", "megatron_hydra.train", *arguments]))
    lines += [
        f"python tools/megatron_to_hf.py --output {workspace.export(student)} "
        f"--checkpoint {workspace.run(student, STAGES[-1]) / 'checkpoints'}",
        f"python tools/evaluate.py --model {workspace.export(student)} --trust-remote-code "
        f"--tasks megatron_hydra.quickstart.tasks:retrieval --lengths 128,256,512,1024 "
        f"--samples {settings['samples']} --seed {seed} --output {workspace.evaluation(student)}",
    ]
    return "\n".join(lines) + "\n"
