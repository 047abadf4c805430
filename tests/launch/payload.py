"""A small trainer for the tests of launch/: it stops, saves, resumes and ends like the real one.

    torchrun ... -m tests.launch.payload --config CONFIG.yaml [key=value ...]

Every rank adds numbers that depend on rank and step. At each step all ranks agree whether to stop. Keys:
``output``, ``after`` (a folder that must hold a finished run), ``steps``, ``seconds``
(of a step), ``fail_at`` (the step at which rank 0 crashes; 0: never).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from megatron_hydra.stopping import REQUEUE_EXIT_CODE, StopRequest


def read_config() -> dict:
    """The config: the YAML file with the command line's overrides."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = {"steps": 10, "seconds": 0.05, "fail_at": 0, "after": ""}
    config |= yaml.safe_load(Path(args.config).read_text())
    for override in args.overrides:
        key, value = override.split("=", 1)
        config[key] = yaml.safe_load(value)
    return config


def write(path: Path, body: dict) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(body))
    os.replace(temporary, path)


def term(step: int, rank: int) -> float:
    """The number that a rank adds at a step."""
    return math.sin(step * 1.7 + rank)


def expected_value(steps: int, world: int) -> float:
    """The value of an undisturbed run, computed by one process (exact for one or two ranks)."""
    value = 0.0
    for step in range(1, steps + 1):
        value = value * 0.9 + sum(term(step, rank) for rank in range(world))
    return value


def run(config: dict, stop: StopRequest) -> int:
    """Do the remaining steps; returns the exit status."""
    rank, world = dist.get_rank(), dist.get_world_size()
    output = Path(config["output"])
    output.mkdir(parents=True, exist_ok=True)
    if config["after"] and not (Path(config["after"]) / "final.json").exists():
        raise SystemExit(f"{config['after']} has not finished")
    saved = output / "state.json"
    state = (
        json.loads(saved.read_text()) if saved.exists() else {"step": 0, "value": 0.0, "starts": 0}
    )
    state["starts"] += 1
    dist.barrier()
    if rank == 0:
        write(output / "started.json", {"world": world, "starts": state["starts"]})
    while state["step"] < config["steps"]:
        state["step"] += 1
        if rank == 0 and state["step"] == config["fail_at"]:
            raise SystemExit(7)
        time.sleep(config["seconds"])
        work = torch.tensor([term(state["step"], rank), float(stop.requested)], dtype=torch.float64)
        dist.all_reduce(work)
        state["value"] = state["value"] * 0.9 + work[0].item()
        if work[1] > 0:
            if rank == 0:
                write(saved, state)
            dist.barrier()
            return REQUEUE_EXIT_CODE
    if rank == 0:
        write(output / "final.json", state)
    dist.barrier()
    return 0


if __name__ == "__main__":
    with StopRequest() as request:
        dist.init_process_group("gloo")
        status = run(read_config(), request)
        dist.destroy_process_group()
    sys.exit(status)
