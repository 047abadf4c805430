"""Worker: several trainings in the same processes, one after the other, each with its own layout.

test_training.py runs it, and the GPU suite over NCCL: ``training_runs FOLDER CASES.json``, under torchrun. Rank
0 prints one JSON line for each case: exit code or error of every rank.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_hydra.config import apply_overrides
from megatron_hydra.errors import HydraError
from megatron_hydra.parallel import platform
from megatron_hydra.training import loop, setup
from megatron_hydra.training.loop import run_training
from megatron_hydra.training.step import TrainState
from megatron_hydra.transfer import finetune
from megatron_hydra.transfer.answers import AnswerCount
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


def _buckets(size: int | None) -> contextlib.AbstractContextManager:
    """Size of a case's gradient buckets. By default it is 40 million parameters, so a tiny model has one."""
    if size is None:
        return contextlib.nullcontext()
    small = functools.partial(setup.DistributedDataParallelConfig, bucket_size=size)
    return mock.patch.object(setup, "DistributedDataParallelConfig", small)


def _digests(train_state: TrainState) -> dict[str, str]:
    """SHA-256 of every tensor that this rank trains or keeps for training."""
    tensors = {
        f"model {i} {name}": parameter
        for i, chunk in enumerate(train_state.chunks)
        for name, parameter in chunk.named_parameters()
    }
    for i, part in enumerate(train_state.optimizer.chained_optimizers):  # type: ignore[attr-defined]
        for j, group in enumerate(part.optimizer.param_groups):
            for k, parameter in enumerate(group["params"]):
                name = f"optimizer {i} {j} {k}"
                state = part.optimizer.state[parameter]
                tensors |= {name: parameter} | {f"{name} {key}": t for key, t in state.items()}
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def _note_digests(path: Path) -> None:
    """Write the hashes of the tensors with which the ranks start the first step."""
    original = loop.train_step

    def noted(train_state: TrainState, *args):
        loop.train_step = original
        everywhere: list = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, _digests(train_state))
        if dist.get_rank() == 0:
            path.write_text(json.dumps(everywhere))
        return original(train_state, *args)

    loop.train_step = noted


def _run(folder: Path, case: dict) -> list:
    train_step = loop.train_step
    config = tiny.run_config(folder, case["verb"], case["output"], **case.get("sections", {}))
    config = apply_overrides(config, case["overrides"])
    if case.get("fault") and dist.get_rank() == dist.get_world_size() - 1:
        FAULTS[case["fault"]]()
    if case.get("digests"):
        _note_digests(folder / case["digests"])
    outcome: int | str
    try:
        with _buckets(case.get("bucket_size")):
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
    AnswerCount.add = tiny.often_right(AnswerCount.add)  # type: ignore[method-assign]
    for case in cases:
        outcomes = _run(folder, case)
        if dist.get_rank() == 0:
            print(json.dumps({"output": case["output"], "outcomes": outcomes}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
