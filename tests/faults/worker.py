"""A rank of a real training with one fault: ``python -m megatron_hydra.train`` and a fault from the environment
variable ``HYDRA_TEST_FAULT`` (JSON; see :class:`Fault`).

Every rank also writes which samples it was fed, step by step, to ``HYDRA_TEST_RECORD``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

SAVE_POINTS = (
    "begin",  # nothing is on the disk yet
    "planned",  # ranks know who writes what; the folder exists
    "writing",  # in the middle of a file
    "written",  # this rank's files are complete
    "indexed",  # rank 0 has written the index
    "sealed",  # the manifest exists, under the temporary name
    "renamed",  # the folder has its name, the pointer still names the last one
    "pointed",  # the pointer has moved
    "retaining",  # an old checkpoint is being deleted
)
MAIN_ONLY = SAVE_POINTS[4:]


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        kind: ``kill`` | ``kill_in_save`` | ``hang`` | ``nan`` | ``spike`` | ``signal`` | ``signal_twice``
            | ``signal_in_save`` | ``slow_close``.
        step: the step before which it happens; in a save: the number of the save in this attempt, from 1.
        rank: the rank that has the fault.
        everyone: whether all ranks get SIGKILL at once.
        point: one of :data:`SAVE_POINTS`.
        mark: a file that is written just before the fault.
    """

    kind: str
    step: int
    rank: int = 0
    everyone: bool = False
    point: str = ""
    mark: str = ""


def _die(fault: Fault) -> None:
    Path(fault.mark).write_text(json.dumps(dataclasses.asdict(fault)))
    me = psutil.Process()
    if fault.everyone:
        for sibling in me.parent().children():
            if sibling.pid != me.pid:
                sibling.kill()
    me.kill()


def _hang(fault: Fault) -> None:
    Path(fault.mark).write_text(str(time.time()))
    time.sleep(3600)


def _signal(fault: Fault) -> None:
    Path(fault.mark).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGTERM)
    if fault.kind == "signal_twice":
        time.sleep(4)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(3600)


def _before_step(step: int, action: Callable[[], None]) -> None:
    from megatron_hydra.training import loop

    original = loop.train_step

    def patched(*args: Any) -> Any:
        if _steps_done[0] + 1 == step:
            action()
        return original(*args)

    loop.train_step = patched


_steps_done = [0]


def _poison(fault: Fault) -> None:
    """Multiply the hidden states of one step on one rank by ``factor``."""
    from megatron_hydra.training import loop
    from megatron_hydra.transfer import distill, finetune

    factor = float("nan") if fault.kind == "nan" else 1e4
    original = loop.train_step

    def patched(*args: Any) -> Any:
        bad = _steps_done[0] + 1 == fault.step
        clean = finetune.final_hidden_states
        if bad:
            Path(fault.mark).write_text("poisoned")
            for module in (finetune, distill):
                module.final_hidden_states = lambda *a: clean(*a) * factor
        try:
            return original(*args)
        finally:
            for module in (finetune, distill):
                module.final_hidden_states = clean

    loop.train_step = patched


def _in_save(fault: Fault, action: Callable[[Fault], None]) -> None:
    """Run ``action`` at the fault's point of the fault's save."""
    from megatron_hydra.checkpoint import store
    from megatron_hydra.training import checkpoint, checkpoint_write, run_folder

    saves = [0]

    def at(owner: Any, name: str, *, after: bool, when: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        def patched(*args: Any, **kwargs: Any) -> Any:
            due = saves[0] == fault.step and when(*args)
            if due and not after:
                action(fault)
            result = original(*args, **kwargs)
            if due and after:
                action(fault)
            return result

        setattr(owner, name, patched)

    begin = checkpoint.RunCheckpoints._check_finite

    def counted(self: Any) -> None:
        saves[0] += 1
        if fault.point == "begin" and saves[0] == fault.step:
            action(fault)
        begin(self)

    checkpoint.RunCheckpoints._check_finite = counted
    always = lambda *_: True  # noqa: E731
    write = checkpoint_write.CheckpointWrite
    if fault.point == "planned":
        at(write, "_plan", after=True, when=always)
    elif fault.point == "writing":
        _die_in_the_middle_of_a_file(fault, lambda: saves[0] == fault.step)
    elif fault.point == "written":
        at(write, "write", after=True, when=always)
    elif fault.point == "indexed":
        at(write, "_complete", after=True, when=always)
    elif fault.point == "sealed":
        at(store, "write_manifest", after=True, when=always)
    elif fault.point in ("renamed", "pointed"):
        is_pointer = lambda path, _: Path(path).name == store.LATEST_FILE  # noqa: E731
        at(checkpoint, "write_text_atomic", after=fault.point == "pointed", when=is_pointer)
    elif fault.point == "retaining":
        at(run_folder.shutil, "rmtree", after=False, when=lambda p, *_: str(p).endswith(".old"))


def _die_in_the_middle_of_a_file(fault: Fault, is_due: Callable[[], bool]) -> None:
    from megatron_hydra.checkpoint import records

    original = records.write_record

    def patched(file: Any, tensor: Any) -> None:
        original(file, tensor)
        if is_due():
            file.write(b"half a tens")
            file.flush()
            _die(fault)

    records.write_record = patched


def _close_slowly(fault: Fault) -> None:
    """Close slowly, as W&B does while it sends the rest of its data."""
    from megatron_hydra.training.metrics import MetricsLog

    close = MetricsLog.close

    def slow(self: Any) -> None:
        if self.enabled:
            time.sleep(3)
            Path(fault.mark).write_text("closed")
        close(self)

    MetricsLog.close = slow


def _count_and_record() -> None:
    """The innermost wrapper of the step: records which samples this rank got."""
    from megatron_hydra.training import loop

    original = loop.train_step
    resume = loop._Run._resume
    folder = os.environ.get("HYDRA_TEST_RECORD", "")

    def resumed(self: Any) -> Any:
        progress = resume(self)
        _steps_done[0] = progress.step
        return progress

    def recorded(train_state: Any, batches: Any, *rest: Any) -> Any:
        if folder:
            samples = [sample for batch in batches for sample in batch.sample_ids]
            line = {"step": _steps_done[0] + 1, "samples": samples}
            with open(Path(folder) / f"rank{train_state.world.rank}.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        result = original(train_state, batches, *rest)
        _steps_done[0] += 1
        return result

    loop._Run._resume = resumed
    loop.train_step = recorded


def main() -> int:
    """Install the fault on its rank, then train."""
    from megatron_hydra import train

    _count_and_record()
    text = os.environ.get("HYDRA_TEST_FAULT", "")
    fault = Fault(**json.loads(text)) if text else None
    if fault is not None and int(os.environ.get("RANK", "0")) == fault.rank:
        if fault.kind.endswith("_in_save"):
            _in_save(fault, _die if fault.kind == "kill_in_save" else _signal)
        elif fault.kind == "slow_close":
            _close_slowly(fault)
        elif fault.kind in ("nan", "spike"):
            _poison(fault)
        else:
            action = {"kill": _die, "hang": _hang}.get(fault.kind, _signal)
            _before_step(fault.step, lambda: action(fault))
    status = train.main()
    if fault is not None and fault.kind == "slow_close" and not Path(fault.mark).exists():
        print("left before rank 0 had closed its log", flush=True)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
