"""Functions for prepare steps in worker processes, and steps that call them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments import fingerprint
from megatron_hydra.experiments.plan import Plan, Step
from megatron_hydra.out_of_memory import out_of_memory_names
from megatron_hydra.stopping import Stopped, stop_requested


def write(folder: Path, model: Path, seed: int, text: str = "x") -> None:
    print("writing", text)
    (folder / "made").write_text(f"{text} {seed}")


def refuse(folder: Path, model: Path, seed: int) -> None:
    raise HydraError("this cannot work: change something")


def break_down(folder: Path, model: Path, seed: int) -> None:
    raise ZeroDivisionError("by zero")


def die(folder: Path, model: Path, seed: int) -> None:
    os._exit(3)


def count(folder: Path, model: Path, seed: int, calls: str) -> None:
    with open(calls, "a") as file:
        file.write(f"{os.getpid()} {seed}\n")
    (folder / "made").write_text("counted")


def meet(folder: Path, model: Path, seed: int, mine: str, other: str) -> None:
    """Run beside another step: each notes its GPU and code folder, and waits for the other's note."""
    Path(mine).write_text(
        " ".join(os.environ[n] for n in ("CUDA_VISIBLE_DEVICES", "HF_MODULES_CACHE"))
    )
    wait_for(folder, model, seed, mine + ".pid", other)


def wait_for(folder: Path, model: Path, seed: int, started: str, file: str) -> None:
    Path(started).write_text(str(os.getpid()))
    while not Path(file).exists():
        time.sleep(0.05)
    (folder / "made").write_text("waited")


def need_room(folder: Path, model: Path, seed: int, other: str, end: str, made: str) -> None:
    """Run out of GPU memory until another step has written ``made``; it then may end."""
    wait_for(folder, model, seed, str(folder.parent / "pid"), other)
    with open(other + ".calls", "a") as file:
        file.write("call\n")
    if not Path(made).exists():
        Path(end).touch()
        with out_of_memory_names("a step", "a smaller batch"):
            raise torch.OutOfMemoryError("CUDA out of memory")


def save_when_stopped(folder: Path, model: Path, seed: int, started: str) -> None:
    Path(started).touch()
    while not stop_requested():
        time.sleep(0.05)
    (folder / "saved").touch()
    raise Stopped


def step(name: str, function: str = "write", inputs: dict | None = None, **options: str) -> Step:
    params = {"function": f"{__name__}:{function}", "options": options, "seed": 0, "name": name}
    key = fingerprint.of_json(params)[:24]
    return Step(key, "prepare", "prepare", name, params, inputs or {}, {"teacher_hf": "none"})


def plan_of(*steps: Step) -> Plan:
    return Plan(
        {one.key: one for one in steps},
        {one.title: one.key for one in steps},
    )
