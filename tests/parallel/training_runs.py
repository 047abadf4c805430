"""Worker: several trainings one after the other in the same processes, each under its own layout.

Run by test_training.py, and by the GPU suite over NCCL: ``training_runs FOLDER CASES.json``, under torchrun.
Rank 0 prints one JSON line a case: exit code or error of every rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_hydra.config import apply_overrides
from megatron_hydra.errors import HydraError
from megatron_hydra.parallel import platform
from megatron_hydra.training import loop
from megatron_hydra.training.loop import run_training
from megatron_hydra.transfer import finetune
from tests.training import tiny


def _at_step(step: int, action) -> None:
    original, count = loop.train_step, [0]

    def patched(*args):
        count[0] += 1
        if count[0] == step:
            action()
        return original(*args)

    loop.train_step = patched


def _nan_at_step(step: int) -> None:
    original = finetune.final_hidden_states

    def poison() -> None:
        finetune.final_hidden_states = lambda *args: original(*args) * float("nan")

    def cure() -> None:
        finetune.final_hidden_states = original

    _at_step(step, poison)
    _at_step(step + 1, cure)


FAULTS = {
    "signal": lambda: _at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "nan": lambda: _nan_at_step(2),
    "hang": lambda: _at_step(2, lambda: time.sleep(600)),
}


def _run(folder: Path, case: dict) -> list:
    train_step = loop.train_step
    config = tiny.run_config(folder, case["verb"], case["output"], **case.get("sections", {}))
    config = apply_overrides(config, case["overrides"])
    if case.get("fault") and dist.get_rank() == dist.get_world_size() - 1:
        FAULTS[case["fault"]]()
    outcome: int | str
    try:
        outcome = run_training(config)
    except HydraError as error:
        outcome = str(error)
    finally:
        loop.train_step = train_step
    outcomes: list = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    return outcomes


def main() -> None:
    """Run every case of the list."""
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(1)
    platform.bind_process_to_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(platform.communication_backend())
    for case in cases:
        outcomes = _run(folder, case)
        if dist.get_rank() == 0:
            print(json.dumps({"output": case["output"], "outcomes": outcomes}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
