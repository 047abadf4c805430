"""Run the missing steps of a plan with worker processes."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from megatron_hydra.experiments import fingerprint
from megatron_hydra.experiments.plan import Plan, Step
from megatron_hydra.experiments.progress import ProgressLine
from megatron_hydra.experiments.store import StepStore
from megatron_hydra.experiments.worker import Outcome, serve
from megatron_hydra.stopping import Stopped, StopRequest

_POLL_SECONDS = 0.5
_LEAVE_SECONDS = 60.0
_GUESS_SECONDS = 20.0
"""Assumed seconds of a kind of step without a finished one."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """A step that could not be computed."""

    step: Step
    message: str


def run_plan(
    plan: Plan,
    store: StepStore,
    workers: int,
    say: Callable[[str], None],
    *,
    threads: int = 1,
    gpus: Sequence[str] = (),
    begin_until: float | None = None,
) -> list[Failure]:
    """Run the missing steps; steps that depend on a failed step are skipped, all others still run.

    Workers may share a GPU. A step of one process that runs out of its memory beside others starts again when
    fewer of them run there, and then keeps more of them away; alone, it fails.

    Args:
        workers: steps at a time.
        say: prints a line for the user.
        threads: torch threads of each worker.
        gpus: values of ``CUDA_VISIBLE_DEVICES``, one for each worker in turn; empty: every worker sees the GPUs
            of this process.
        begin_until: value of ``time.monotonic()`` after which no step starts; running steps continue to their
            end.

    Returns:
        The failed steps.

    Raises:
        Stopped: SIGTERM, SIGUSR1 or Ctrl-C; the workers have saved their work.
    """
    todo = missing_steps(plan, store)
    say(f"{len(plan.steps)} steps, {_finished(plan, store, todo)}")
    if not todo:
        return []
    schedule = _Schedule(plan, store, todo)
    line = ProgressLine(store)
    stopping = False
    pool_size = min(workers, len(todo))
    with StopRequest(ctrl_c=True) as stop, _Pool(store, pool_size, threads, gpus) as pool:
        while not stopping:
            may_begin = begin_until is None or time.monotonic() < begin_until
            for step in schedule.ready(pool.idle if may_begin else 0, pool.steps_beside_next):
                folders = {n: store.out(plan.steps[k]) for n, k in step.inputs.items()}
                pool.start(step, folders, schedule.too_many.get(step.key))
            if not pool.busy:
                break
            for end in pool.finished(_POLL_SECONDS):
                line.clear()
                say(schedule.note(end, workers))
            line.show(schedule.running.values(), schedule.left(workers))
            stopping = stop.requested
        line.clear()
        if stopping:
            say("stopping: the workers save what they have")
    if stopping:
        say("stopped: the same command resumes from here")
        raise Stopped
    return schedule.failures


def _finished(plan: Plan, store: StepStore, todo: Mapping[str, Step]) -> str:
    """The number of finished steps, and the number of those that other code than today's has computed."""
    records = [store.record(step) for key, step in plan.steps.items() if key not in todo]
    here = fingerprint.of_package()
    others = sum(record is not None and record.get("package_source") != here for record in records)
    text = f"{len(records)} of them finished before"
    return f"{text}, {others} by other versions of the package's code" if others else text


def missing_steps(plan: Plan, store: StepStore) -> dict[str, Step]:
    """Missing steps of the unfinished cells, in the order of the plan.

    A finished step without weights (:mod:`~.pack`) is computed again only if an unfinished one reads it.
    """
    needed: set[str] = set()

    def visit(key: str) -> None:
        if key in needed:
            return
        needed.add(key)
        for other in plan.steps[key].inputs.values():
            if not store.is_whole(plan.steps[other]):
                visit(other)

    for key in plan.cells.values():
        if not store.is_done(plan.steps[key]):
            visit(key)
    return {key: step for key, step in plan.steps.items() if key in needed}


@dataclasses.dataclass(frozen=True)
class _End:
    """A step has ended. At most ``beside`` other steps of this run were on its GPU at the same time."""

    key: str
    outcome: Outcome
    beside: int


class _Schedule:
    """Scheduler: which steps are ready, in the order of the plan, and the remaining time."""

    def __init__(self, plan: Plan, store: StepStore, todo: dict[str, Step]) -> None:
        self.plan, self.store = plan, store
        self.waiting = dict(todo)
        self.running: dict[str, Step] = {}
        self.failures: list[Failure] = []
        self.total = len(todo)
        self.number = 0
        self.seconds: dict[str, list[float]] = {}
        self.before = store.seconds_by_kind()
        self.started: dict[str, float] = {}
        self.too_many: dict[str, int] = {}
        """Of a step: the number of others on a GPU beside which its memory did not suffice."""

    def ready(self, count: int, beside: Callable[[], int | None]) -> Iterator[Step]:
        """At most ``count`` steps whose inputs exist; they count as running.

        Args:
            beside: the number of steps that already run where the next one would start; ``None``: no GPU may
                take another one.
        """
        for key in list(self.waiting):
            others = beside() if count else None
            if others is None:
                return
            step = self.waiting[key]
            if all(self._has_result(other) for other in step.inputs.values()):
                if key in self.too_many and others >= self.too_many[key]:
                    return  # the room that becomes free is kept for it
                self.running[key] = self.waiting.pop(key)
                self.started[key] = time.monotonic()
                count -= 1
                yield step

    def _has_result(self, key: str) -> bool:
        blocked = key in self.waiting or key in self.running
        return not blocked and all(failure.step.key != key for failure in self.failures)

    def note(self, end: _End, workers: int) -> str:
        """Record that a step has ended; returns the line for the user."""
        step = self.running.pop(end.key)
        taken = time.monotonic() - self.started.pop(end.key)
        if end.outcome.short_of_memory and end.beside:
            self.waiting = {end.key: step, **self.waiting}
            self.too_many[end.key] = min(end.beside, self.too_many.get(end.key, end.beside))
            self.store.forget_failure(step)
            others = "another step" if end.beside == 1 else f"{end.beside} others"
            return f"{step.title}: out of GPU memory beside {others}; starts again when fewer run there"
        self.number += 1
        head = f"[{self.number}/{self.total}] {step.title}"
        if message := end.outcome.message:
            self.failures.append(Failure(step, message))
            self._drop_dependents()
            return f"{head}: FAILED: {message}"
        self.seconds.setdefault(step.kind, []).append(taken)
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"{head}: {taken:.0f} s{failed}; {self.left(workers)}"

    def _drop_dependents(self) -> None:
        bad = {failure.step.key for failure in self.failures}
        for key in list(self.waiting):
            if bad & set(self.plan.ancestors(key)):
                del self.waiting[key]
                self.total -= 1

    def _cost(self, kind: str) -> float:
        here = self.seconds.get(kind)
        return sum(here) / len(here) if here else self.before.get(kind, _GUESS_SECONDS)

    def left(self, workers: int) -> str:
        """The estimated time of the remaining steps."""
        now = time.monotonic()
        left = sum(self._cost(step.kind) for step in self.waiting.values())
        left += sum(
            max(0.0, self._cost(step.kind) - (now - self.started[key]))
            for key, step in self.running.items()
        )
        return f"about {left / workers / 60:.1f} min left"


class _Pool:
    """Worker processes; if one dies, only its step fails."""

    def __init__(self, store: StepStore, count: int, threads: int, gpus: Sequence[str]) -> None:
        self.store, self.count, self.threads = store, count, threads
        # The devices for workers that may still start; a worker that dies returns its device.
        self.devices = [gpus[n % len(gpus)] if gpus else None for n in reversed(range(count))]
        self.device_of: dict[BaseProcess, str | None] = {}
        self.context = multiprocessing.get_context("spawn")
        self.free: list[tuple[BaseProcess, Connection]] = []
        self.busy: dict[Connection, tuple[BaseProcess, Step]] = {}
        self.beside: dict[Connection, int] = {}
        """Of a running step: the largest number of others on its GPU so far."""
        self.limits: dict[Connection, int] = {}
        """Of a running step that had no memory beside so many others: fewer may join it."""
        self.modules = tempfile.TemporaryDirectory(prefix="hydra_modules_")

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process, connection in self.free:
            connection.close()
            process.join()
        for process, _step in self.busy.values():
            process.terminate()
        deadline = time.monotonic() + _LEAVE_SECONDS
        for process, _step in self.busy.values():
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self.modules.cleanup()

    @property
    def idle(self) -> int:
        """The number of further steps that may run."""
        return self.count - len(self.busy)

    def start(self, step: Step, folders: dict, limit: int | None = None) -> None:
        """Give a step to a worker of the GPU with the fewest running steps.

        Args:
            limit: fewer than so many other steps may run on its GPU.
        """
        device = self._open_devices()[0]
        ours = [n for n, (process, _) in enumerate(self.free) if self.device_of[process] == device]
        process, connection = self.free.pop(ours[-1]) if ours else self._spawn(device)
        connection.send((step, folders))
        self.busy[connection] = (process, step)
        if limit is not None:
            self.limits[connection] = limit
        mates = self._on(device)
        for mate in mates:
            self.beside[mate] = max(self.beside.get(mate, 0), len(mates) - 1)

    def steps_beside_next(self) -> int | None:
        """The number of steps that already run where the next one would start; ``None``: it may start nowhere.

        With workers that all see the same GPUs, or none, these are all steps.
        """
        devices = self._open_devices()
        return len(self._on(devices[0])) if devices else None

    def _open_devices(self) -> list[str | None]:
        """Devices of idle workers whose running steps allow one more; those with the fewest come first."""
        idle = [self.device_of[process] for process, _ in reversed(self.free)]
        devices = dict.fromkeys([*idle, *reversed(self.devices)])
        return sorted(
            filter(self._allows_one_more, devices), key=lambda device: len(self._on(device))
        )

    def _allows_one_more(self, device: str | None) -> bool:
        mates = self._on(device)
        return all(len(mates) < self.limits[mate] for mate in mates if mate in self.limits)

    def _on(self, device: str | None) -> list[Connection]:
        return [c for c, (process, _) in self.busy.items() if self.device_of[process] == device]

    def _spawn(self, device: str | None) -> tuple[BaseProcess, Connection]:
        mine, theirs = self.context.Pipe()
        self.devices.remove(device)
        variables = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        with _environment(
            OMP_NUM_THREADS=str(self.threads),
            TOKENIZERS_PARALLELISM="false",
            TRANSFORMERS_VERBOSITY="error",
            # transformers copies an export's code to this folder and imports it. Processes that shared the
            # folder would import each other's half-written files.
            HF_MODULES_CACHE=tempfile.mkdtemp(dir=self.modules.name),
            **variables,
        ):
            process = self.context.Process(target=serve, args=(theirs, str(self.store.root)))
            # Ctrl-C must not end the worker before it has its own handler.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                process.start()
            finally:
                signal.signal(signal.SIGINT, handler)
        self.device_of[process] = device
        theirs.close()
        return process, mine

    def finished(self, timeout: float) -> list[_End]:
        """The steps that have ended."""
        done = []
        for connection in wait(list(self.busy), timeout):
            assert isinstance(connection, Connection)
            process, step = self.busy.pop(connection)
            beside = self.beside.pop(connection)
            self.limits.pop(connection, None)
            try:
                key, outcome = connection.recv()
                self.free.append((process, connection))
            except EOFError:
                process.join()
                self.devices.append(self.device_of.pop(process))
                outcome = Outcome(f"the worker process died (exit status {process.exitcode})")
                self.store.fail(step, outcome.message)
                key = step.key
            done.append(_End(key, outcome, beside))
        return done


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
