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

from megatron_hydra.config.loading import load_run_config
from megatron_hydra.errors import HydraError
from megatron_hydra.files import sha256_of_file, write_text_atomic
from megatron_hydra.quickstart.progress import TrainingProgress
from megatron_hydra.quickstart.student import evaluate_model, stage_arguments, stage_config
from megatron_hydra.quickstart.workspace import STAGES, STUDENTS, Workspace, shipped_teacher
from megatron_hydra.stopping import exit_if_stopped
from megatron_hydra.version import __version__

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
        fresh: discard an earlier run in ``output``.
        say: prints a line for the user.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        HydraError: ``output`` holds something else, a config is wrong, or a student failed; its log
            is named.
        Stopped: inside a :class:`~megatron_hydra.stopping.StopRequest`, on a signal.
    """
    _check_configs(configs)
    _silence_libraries()
    workspace = Workspace(output)
    body = dataclasses.asdict(settings) | {"overrides": list(settings.overrides)}
    body |= fingerprints(configs)
    with workspace.opened(body, fresh):
        return _run(workspace, configs, settings, body, say)


def _run(
    workspace: Workspace,
    configs: Path,
    settings: Settings,
    body: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    from megatron_hydra.quickstart.report import write_report

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
        exit_if_stopped()
        head = f"[{number}/{len(steps)}] {title}"
        with workspace.phase(name) as todo:
            if not todo:
                say(f"{head}: done before")
                continue
            say(head)
            begun = time.monotonic()
            action()
        say(f"      {time.monotonic() - begun:.0f} s")
    commands = commands_by_hand(workspace, configs, body)
    write_text_atomic(workspace.root / "commands.sh", commands)
    metrics = write_report(workspace, body, RATIO, say)
    say(f"finished in {time.monotonic() - started:.0f} s; everything is in {workspace.root}")
    return metrics


def _discard(_: Any) -> None:
    """For actions whose result is in a file."""


def _silence_libraries() -> None:
    """Hints about missing GPU libraries and loading bars hide what the user should see."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _check_configs(configs: Path) -> None:
    for name in ("common", *STAGES):
        if not (configs / f"{name}.yaml").is_file():
            raise HydraError(f"--configs {configs} has no {name}.yaml")


def fingerprints(configs: Path) -> dict[str, str]:
    """What decides the results beside the settings: a run does not go on where one has changed.

    Returns:
        the first digits of the SHA-256 of every config and of the teacher's weights, and the
        package's version.
    """
    files = {f"{name}.yaml": configs / f"{name}.yaml" for name in ("common", *STAGES)}
    files["teacher"] = shipped_teacher() / "model.safetensors"
    return {name: sha256_of_file(path)[:16] for name, path in files.items()} | {
        "version": __version__
    }


# -- head selection and conversion ----------------------------------------------------------------


def _select(workspace: Workspace, settings: Settings) -> None:
    """Head maps of the three students, and the pictures of the selected one."""
    from megatron_hydra.hf_loading import find_tokenizer
    from megatron_hydra.quickstart.tasks import write_calibration, write_selection_prompts
    from megatron_hydra.selection import SelectionOptions, select_heads
    from megatron_hydra.selection.plots import draw_head_map

    teacher, seed = shipped_teacher(), settings.seed
    tokenizer = find_tokenizer(teacher)
    write_selection_prompts(workspace.prompts, tokenizer, settings.prompts, seed)
    write_calibration(workspace.calibration, tokenizer, seed)
    chosen = select_heads(
        teacher,
        ratio=RATIO,
        strategy="global_interp",
        tasks=[f"jsonl:{workspace.prompts}"],
        seed=seed,
        options=SelectionOptions(
            num_prompts=settings.prompts,
            min_prompts=max(1, settings.prompts // 2),
        ),
        show_progress=sys.stderr.isatty(),
    )
    chosen.save(workspace.head_map("hydra"))
    draw_head_map(chosen, workspace.root / "head_maps" / "hydra")
    shutil.copyfile(
        workspace.root / "head_maps" / "hydra_unified.png", workspace.root / "head_importance.png"
    )
    drawn = select_heads(teacher, ratio=RATIO, strategy="global_random", seed=seed)
    drawn.save(workspace.head_map("random"))
    select_heads(teacher, ratio="all-gdn", strategy="layer_random").save(
        workspace.head_map("all_gdn")
    )


def _convert(workspace: Workspace, settings: Settings) -> None:
    """What ``tools/hf_to_megatron.py`` does, four times."""
    from megatron_hydra.conversion.convert import StudentOptions, hf_to_megatron

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
            _check(workspace, processes)
            progress.show()
            time.sleep(_POLL_SECONDS)
        _check(workspace, processes)
    finally:
        _end(list(processes.values()))
        progress.close()


def _check(workspace: Workspace, processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Leave if this process was asked to stop, or if a student has failed."""
    exit_if_stopped()
    for student, process in processes.items():
        if process.poll():
            raise HydraError(_failure(workspace, student, process.returncode))


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Stop what still runs, all at once, and wait: a stage of training saves before it ends."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait()


def _start(workspace: Workspace, student: str, configs: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megatron_hydra.quickstart.student"]
    command += ["--student", student, "--output", str(workspace.root), "--configs", str(configs)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",  # three processes on two cores: more threads only get in the way
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # transformers copies an export's code there before it imports it: processes that share the
        # folder import each other's half-written files.
        "HF_MODULES_CACHE": str(workspace.modules(student)),
        "PYTHONWARNINGS": "ignore",
    }
    with open(workspace.log(student), "ab") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(workspace.lock,),
        )


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
    head_map = workspace.head_map(student)
    trained = workspace.run(student, STAGES[-1]) / "checkpoints"
    commands: list[list[Any]] = [
        ["tools/select_heads.py", "--hf-path", teacher, "--ratio", RATIO, "--seed", seed]
        + ["--strategy", "global_interp"]
        + ["--num-prompts", settings["prompts"]]
        + ["--tasks", f"jsonl:{workspace.prompts}", "--output", head_map],
        ["tools/hf_to_megatron.py", "--hf-path", teacher, "--output", workspace.teacher],
        ["tools/hf_to_megatron.py", "--hf-path", teacher, "--output", workspace.initial(student)]
        + ["--head-map", head_map, "--seed", seed, "--calibration-file", workspace.calibration],
        *(
            ["-m", "megatron_hydra.train"]
            + stage_arguments(*stage_config(workspace, student, stage, configs, settings))
            for stage in STAGES
        ),
        ["tools/megatron_to_hf.py", "--output", workspace.export(student), "--checkpoint", trained],
        ["tools/evaluate.py", "--model", workspace.export(student), "--trust-remote-code"]
        + ["--tasks", "megatron_hydra.quickstart.tasks:retrieval", "--lengths", "128,256,512,1024"]
        + ["--samples", settings["samples"], "--seed", seed]
        + ["--output", workspace.evaluation(student)],
    ]
    lines = [
        "# What the quickstart did for HydraHead, as commands; run them in the repository's root,",
        "# with other output folders. The prompts were made by",
        "# megatron_hydra.quickstart.tasks.write_selection_prompts.",
        *(shlex.join(["python", *map(str, words)]) for words in commands),
    ]
    return "\n".join(lines) + "\n"
