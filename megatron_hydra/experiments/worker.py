"""Worker process: runs several steps, because importing torch takes longer than a short step."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.actions import ACTIONS, Context
from megatron_hydra.experiments.plan import Step
from megatron_hydra.experiments.store import StepStore
from megatron_hydra.out_of_memory import OutOfMemory, is_out_of_memory
from megatron_hydra.stopping import Stopped, StopRequest


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a step has ended.

    Attributes:
        message: the reason of its failure; empty: it is finished.
        short_of_memory: whether the reason is that a GPU's memory did not suffice.
    """

    message: str = ""
    short_of_memory: bool = False


def compute(store: StepStore, step: Step, folders: dict[str, Path]) -> Outcome:
    """Compute one step if it is missing; the step's log gets its output.

    Args:
        folders: name of an input → its ``out`` folder.

    Returns:
        Its outcome; a failure is also recorded in the store.

    Raises:
        Stopped: it was asked to stop; its work is saved.
    """
    with store.claimed(step) as todo:
        if not todo:
            return Outcome()
        started, cpu = time.monotonic(), _cpu_seconds()
        with _output_to(store.log(step)):
            print(f"== {step.title} ({time.strftime('%Y-%m-%d %H:%M:%S')})", flush=True)
            try:
                with StopRequest():
                    store.discard_leftovers(step)
                    ACTIONS[step.action](Context(step, store.out(step), folders))
            except Stopped:
                store.stop(step, time.monotonic() - started, _cpu_seconds() - cpu)
                raise
            except HydraError as error:
                message, short = str(error), isinstance(error, OutOfMemory)
            except Exception as error:
                traceback.print_exc()
                message, short = f"{type(error).__name__}: {error}", is_out_of_memory(error)
            else:
                store.finish(step, time.monotonic() - started, _cpu_seconds() - cpu)
                return Outcome()
            print(f"error: {message}", file=sys.stderr, flush=True)
        store.fail(step, message)
        return Outcome(message, short)


def serve(connection: Connection, root: str) -> None:
    """Compute incoming steps; sends (key, outcome) for each."""
    # Ctrl-C reaches every process of a terminal. The executor handles it and sends SIGTERM to its workers,
    # which save. If workers ignored the signal, the processes that a step starts would also ignore it.
    signal.signal(signal.SIGINT, lambda *_: None)
    from megatron_hydra.parallel import platform  # this also imports Megatron-Core

    platform.keep_freed_memory()
    store = StepStore(Path(root))
    while True:
        try:
            step, folders = connection.recv()
        except EOFError:
            return
        outcome = compute(store, step, folders)
        platform.free_cached_memory()  # other workers may share the GPU
        connection.send((step.key, outcome))


def _cpu_seconds() -> float:
    """CPU seconds of this process and of ended processes that it has started."""
    return sum(os.times()[:4])


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Redirect file descriptors 1 and 2 to a file, so that no output of a step is lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
