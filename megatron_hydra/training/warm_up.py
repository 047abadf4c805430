"""Compile a run's kernels once per node before training, in separate processes.

The first rank of a node to arrive takes a lock, starts workers (:mod:`.warm_worker`), and gives them the
run's scenes (:mod:`.rehearsal`). If FlashQLA computes GDN heads, one more worker first lists TileLang's kernels
of the first scene and of the start-up check (:mod:`megatron_hydra.ops.tilelang_kernels`), and the others
compile those that have no record yet. The first scene runs alone, because it also tunes kernels. Then all other
scenes and the start-up check run in parallel. Records next to the compilers' caches name the scenes that have
run, and the check. The other ranks, and later runs, skip what has a record. So another head map compiles only
layers of new shapes. A scene that fails is not an error: a warning is logged, and each rank compiles this part
in its first step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_hydra.config.loading import to_dict
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.model.layer_spec import kernel_case
from megatron_hydra.ops import fla_tuning, kernel_cache
from megatron_hydra.ops.compiler_output import COMPILE_LOG, last_lines
from megatron_hydra.ops.packages import is_hopper
from megatron_hydra.parallel import platform
from megatron_hydra.stopping import exit_on_stop_signal, kill_group_on_exit
from megatron_hydra.training.rehearsal import scenes
from megatron_hydra.watchdog import PATIENCE, feed_watchdog

_log = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "megatron_hydra.training.warm_worker")

MOST_WORKERS = 8

Task = dict[str, Any]
"""An order of :mod:`.warm_worker`."""

PROGRESS_SECONDS = 10.0
"""Seconds between two lines of progress."""

_NOT_COMMON = {"num_layers", "full_attention_heads", "head_map", "source", "hf_config"}
"""Keys of a model's config that decide no kernel of one of its layers."""

_MEMORY_SHARE = 0.8
"""Share of a GPU's memory for all its workers; the rest is for their contexts."""


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """Result of compiling.

    Attributes:
        ready: whether all kernels are compiled and checked.
        compiled: number of scenes that this process had compiled; 0 if all were ready.
        seconds: time taken, waiting included.
        problem: reason if not all kernels are ready, else empty.
    """

    ready: bool
    compiled: int
    seconds: float
    problem: str = ""


def compile_once_per_node(
    config: RunConfig,
    model: ModelConfig,
    teacher: ModelConfig | None,
    *,
    tell: Callable[[str], None],
    local_rank: int = 0,
    worker: Sequence[str] = WORKER,
    cards: int | None = None,
) -> WarmUp:
    """Compile this run's kernels in workers, or wait for another process of the node that does.

    Every process calls it, inside a :class:`~megatron_hydra.stopping.StopRequest` block. A stop signal ends
    it at once. It feeds the watchdog.

    Args:
        config: the run.
        model, teacher: configs of its checkpoints.
        tell: shows a line of progress.
        local_rank: the GPU of this process.
        worker: command of a worker; tests use another one.
        cards: GPUs to use; ``None``: all of the node. Without a GPU it does nothing.

    Raises:
        HydraError: a kernel fails the start-up check.
    """
    cards = platform.device_count() if cards is None else cards
    if not cards:
        return WarmUp(True, 0, 0.0)
    started = time.monotonic()
    tasks = _tasks_of(config, model, teacher)
    key = f"run-{kernel_cache.key_of([task['record'] for task in tasks])}"

    def still_to_do() -> list[Task]:
        return [task for task in tasks if not kernel_cache.is_recorded(task["record"])]

    def waiting(seconds: float) -> None:
        feed_watchdog(PATIENCE)
        if int(seconds) % int(3 * PROGRESS_SECONDS) == 0:
            tell(f"another process compiles this run's kernels: waiting, {seconds:.0f} s so far")

    with exit_on_stop_signal("kernels are being compiled"):
        if not still_to_do():
            return WarmUp(True, 0, time.monotonic() - started)
        with kernel_cache.alone_on_this_node(key, waiting):
            todo = still_to_do()
            if not todo:
                return WarmUp(True, 0, time.monotonic() - started)
            log = Path(config.output) / COMPILE_LOG
            order = {
                "config": to_dict(config), "model": to_dict(model), "log": str(log.absolute()),
                "teacher": None if teacher is None else to_dict(teacher),
            }  # fmt: skip
            listed = _asks_for_tilelang(config, model)
            team = _WorkerPool(order, todo, local_rank, cards, worker, tell, listed)
            problem = team.work()
            return WarmUp(not problem, team.num_scenes, time.monotonic() - started, problem)


def _asks_for_tilelang(config: RunConfig, model: ModelConfig) -> bool:
    """Whether FlashQLA's kernels for Hopper compute GDN heads of this run."""
    case = kernel_case(model, config)
    hopper = case.device.type == "cuda" and is_hopper(case.device)
    return hopper and any(fla_tuning.is_flash_qla(case, heads) for heads in case.gdn_heads)


def _tasks_of(config: RunConfig, model: ModelConfig, teacher: ModelConfig | None) -> list[Task]:
    """All scenes of a run and the start-up check, each with the name of its record.

    The name is a hash of all values that decide the task's kernels and their compilation. Which heads of a
    layer are FA is none of them. Their numbers are: a scene's shape and the check's case have these.
    """
    layout = {
        "precision": config.precision, "deterministic": config.deterministic, "backend": config.backend,
        "tensor": config.parallel.tensor, "context": config.parallel.context,
        "sequence": config.parallel.sequence, "fa_partition": config.parallel.fa_partition,
    }  # fmt: skip
    step = {
        "verb": config.verb, "micro_batch_size": config.batch.micro_batch_size,
        "sequence_length": config.data.sequence_length, "loss": config.loss,
        "recompute": config.recompute,
    }  # fmt: skip
    facts = [kernel_cache.fingerprint(platform.device()), _plain(layout), _any_layer(model)]
    if teacher is not None:  # a scene has its first layer
        facts += [_any_layer(teacher), (teacher.full_attention_heads or (None,))[0]]

    def task(kind: str, name: Any, about: dict[str, Any], *decisive: Any) -> Task:
        record = f"warm-{kind}-{kernel_cache.key_of([*facts, *decisive])}"
        return {kind: name, "record": record, "facts": about}

    found = []
    for number, scene in enumerate(scenes(config, model)):
        about = {"verb": config.verb, "scene": str(scene)}
        found.append(task("scene", number, about, _plain(step), scene.shape))
    heads = [None if of is None else kernel_case(of, config).gdn_heads for of in (model, teacher)]
    return [*found, task("check", True, {"gdn_heads": heads}, heads)]


def _any_layer(model: ModelConfig) -> dict[str, Any]:
    """What the layers of a model have in common; a scene's shape says whether its FA heads are rotary."""
    names = {field.name for field in dataclasses.fields(model)} - _NOT_COMMON
    common = {name: _plain(getattr(model, name)) for name in names}
    if model.hydra is not None:
        del common["hydra"]["fa_rotary_every"]
    return common


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


class _WorkerPool:
    """The workers of a node and their remaining tasks."""

    def __init__(
        self,
        order: dict[str, Any],
        todo: Sequence[Task],
        local_rank: int,
        cards: int,
        command: Sequence[str],
        tell: Callable[[str], None],
        list_kernels: bool = False,
    ) -> None:
        self.order, self.cards = order, cards
        self.local_rank, self.command, self.tell = local_rank, command, tell
        self.list_kernels = list_kernels
        self.kernels: list[Task] = []
        self.num_kernels = 0
        shown = [task for task in todo if "scene" in task]
        checks = [task for task in todo if "check" in task]
        # The check takes long and runs few tokens. It starts after the first scene, which tunes, but not last.
        self.waiting: list[Task] = [*shown[:1], *checks, *shown[1:]]
        self.num_scenes = len(shown)
        self.started = time.monotonic()
        self.told = 0.0
        self.done = 0
        self.problems: list[str] = []
        self.limit = 1
        self.selector = selectors.DefaultSelector()

    def work(self) -> str:
        """Do all tasks. Return the problem, or an empty text.

        Raises:
            HydraError: a kernel fails the start-up check.
        """
        self.tell(
            f"compiling this run's kernels: {self.num_scenes} combinations of heads, documents and "
            f"shards; the compilers' output is in {self.order['log']}"
        )
        useful = MOST_WORKERS if self.list_kernels else min(MOST_WORKERS, len(self.waiting))
        count = min(useful, max(1, (os.cpu_count() or 1) // 2))
        with contextlib.ExitStack() as stack:
            team = [stack.enter_context(self._worker(i, count)) for i in range(count)]
            if self.list_kernels:
                with self._worker(0, count) as player:
                    self._compile_listed(player, team)
            self._tasks(team)
            for member in team:
                member.give({"end": True})
        return "; ".join(dict.fromkeys(self.problems))

    @contextlib.contextmanager
    def _worker(self, index: int, count: int) -> Iterator[_WorkerProcess]:
        threads = max(1, (os.cpu_count() or 1) // (1 if index == 0 else count))
        device = (self.local_rank + index) % self.cards
        process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            start_new_session=True, env=_single_process_environment(),
        )  # fmt: skip
        with kill_group_on_exit(process.pid):
            member = _WorkerProcess(process)
            member.give({**self.order, "device": device, "threads": threads})
            assert process.stdout is not None
            self.selector.register(process.stdout, selectors.EVENT_READ, member)
            try:
                yield member
            finally:
                with contextlib.suppress(KeyError):
                    self.selector.unregister(process.stdout)
                if sys.exc_info()[0] is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(30)
        process.wait()

    def _compile_listed(self, player: _WorkerProcess, team: list[_WorkerProcess]) -> None:
        """Let ``player`` list TileLang's kernels, and the team compile those with the longest sources first.

        A kernel that fails is no problem here: the scene or the check that asks for it will tell.
        """
        to_play: list[Task] = [
            {"play": next((task["scene"] for task in self.waiting if "scene" in task), 0)}
        ]
        while any(member.is_alive for member in team):
            if player.is_ready and to_play:
                player.task = to_play.pop()
                player.give(player.task)
            for member in team:
                if self.kernels and member.is_alive and member.is_ready and member.task is None:
                    member.task = max(self.kernels, key=lambda task: task["kernel"]["source"])
                    self.kernels.remove(member.task)
                    member.give(member.task)
            listed = not player.is_alive or (not to_play and player.task is None)
            if listed and not self.kernels and all(member.task is None for member in team):
                break
            self._read_answers()
        player.give({"end": True})

    def _tasks(self, team: list[_WorkerProcess]) -> None:
        """Run the first scene on one worker, then the check and all other scenes on all workers that fit."""
        while self.waiting or any(member.task is not None for member in team):
            for index, member in enumerate(team[: self.limit]):
                is_free = member.is_alive and member.is_ready and member.task is None
                # The first scene runs alone, because it tunes kernels by timing.
                if not is_free or not self.waiting or (self.done == 0 and index):
                    continue
                member.task = self.waiting.pop(0)
                member.give(member.task)
            if not any(member.is_alive for member in team):
                self.problems.append("all compiling processes have ended")
                return
            self._read_answers()
            if self.done:
                self.limit = self._fitting_workers(team)

    def _fitting_workers(self, team: list[_WorkerProcess]) -> int:
        """Number of workers that fit into the GPUs' memory, by the largest use so far."""
        used = max((member.memory for member in team), default=0)
        total = platform.device_memory_bytes()
        if not used or not total:
            return len(team)
        return max(1, min(len(team), int(_MEMORY_SHARE * total * self.cards / used)))

    def _read_answers(self) -> None:
        """Read the workers' answers for a second, feed the watchdog, and log progress."""
        feed_watchdog(PATIENCE)
        for chosen, _ in self.selector.select(1.0):
            member: _WorkerProcess = chosen.data
            answers = member.answers()
            if answers is not None:
                for answer in answers:
                    self._handle_answer(member, answer)
                continue
            self.selector.unregister(chosen.fileobj)
            member.is_alive = False
            if member.task is not None:
                status = member.process.wait()
                self._finish(member, f"a compiling process ended with status {status}")
        now = time.monotonic()
        if now - self.told >= PROGRESS_SECONDS:
            self.told = now
            doing = [member.doing for member in self._members() if member.task is not None]
            done = f"{self.done} of {self.num_scenes} done"
            if self.kernels:
                done = f"{self.num_kernels - len(self.kernels)} of {self.num_kernels} of FlashQLA begun"
            self.tell(
                f"compiling kernels: {done}, {now - self.started:.0f} s"
                + (f"; now {'; '.join(doing[:2])}" if doing else "")
            )

    @functools.cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return kernel_cache.fingerprint(platform.device())

    def _key_of_kernel(self, kernel: dict[str, Any]) -> str:
        return f"kernel-{kernel_cache.key_of([self._fingerprint, kernel])}"

    def _members(self) -> list[_WorkerProcess]:
        return [key.data for key in self.selector.get_map().values()]

    def _handle_answer(self, member: _WorkerProcess, answer: dict[str, Any]) -> None:
        if "ready" in answer:
            member.is_ready = True
        elif "part" in answer:
            member.part, member.kernel = answer["part"], ""
        elif "kernel" in answer:
            member.kernel = answer["kernel"]
        elif "noted" in answer:
            # A worker needs seconds of imports to find a kernel in TileLang's cache.
            if not kernel_cache.is_recorded(self._key_of_kernel(answer["noted"])):
                self.kernels.append({"kernel": answer["noted"]})
                self.num_kernels += 1
        elif "refused" in answer:
            raise HydraError(f"{answer['refused']} (compilers' messages: {self.order['log']})")
        else:
            member.memory = max(member.memory, answer.get("memory", 0))
            self._finish(member, f"{member.part}: {answer['failed']}" if "failed" in answer else "")

    def _finish(self, member: _WorkerProcess, problem: str = "") -> None:
        task, member.task = member.task or {}, None
        self.done += "scene" in task
        if "kernel" in task and not problem:
            kernel_cache.record(self._key_of_kernel(task["kernel"]), task["kernel"])
        elif "record" in task and not problem:
            kernel_cache.record(task["record"], task["facts"])
        if problem and ("scene" in task or "check" in task):
            self.problems.append(problem)
        elif problem:
            _log.info("not compiled ahead: %s", problem)


class _WorkerProcess:
    """One worker."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.is_ready, self.is_alive = False, True
        self.task: Task | None = None
        self.memory = 0
        self.part, self.kernel = "", ""
        self._received = b""

    @property
    def doing(self) -> str:
        return f"{self.part}: {self.kernel}" if self.kernel else self.part

    def answers(self) -> list[dict[str, Any]] | None:
        """Read the worker's new answers; ``None`` if it has ended. Call it only when data are available."""
        assert self.process.stdout is not None
        received = os.read(self.process.stdout.fileno(), 1 << 16)
        if not received:
            return None
        *lines, self._received = (self._received + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def give(self, order: dict[str, Any]) -> None:
        """Send an order to the worker. If the worker has ended, :meth:`answers` reports it."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(order).encode() + b"\n")


def _single_process_environment() -> dict[str, str]:
    """The environment without the variables that make a process a rank of this run."""
    ours = (
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "GROUP_RANK",
        "LOCAL_",
        "TORCHELASTIC_",
    )
    given = kernel_cache.environment_as_given()
    return {name: value for name, value in given.items() if not name.startswith(ours)}


def warning_of(result: WarmUp, output: str) -> str:
    """One log line if not all kernels are ready."""
    log = Path(output) / COMPILE_LOG
    said = last_lines(log)
    return (
        f"not all kernels were compiled before the start ({result.problem}): each rank compiles the missing "
        f"ones in its first steps, which take minutes longer. See {log}"
        + (f": {said}" if said else "")
    )
