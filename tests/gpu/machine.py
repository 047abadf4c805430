"""Give the GPUs of this machine to jobs, which run concurrently.

A job is a function that starts processes on its GPUs. Jobs name the jobs that they need; a job runs as soon as
it can. Without GPUs, ``HYDRA_GPU_DRY_RUN=N`` pretends a machine with N GPUs: the same commands run over gloo on
the CPU, one job at a time.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._processes import Family

ROOT = Path(__file__).resolve().parents[2]
DRY_RUN = "HYDRA_GPU_DRY_RUN"
JOBS_PER_GPU = 4
"""Processes on one GPU. The models are small: several fit, and each waits for its host most of the time."""
LIMIT_SECONDS = 600
"""Seconds that one process may take: a hang costs no more than this."""


class JobFailed(Exception):
    """A job failed; the message ends with the last lines of its log."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine that jobs run on.

    Attributes:
        gpus: indices for ``CUDA_VISIBLE_DEVICES``; in a dry run, numbers without a meaning.
        is_dry_run: whether processes run on the CPU.
    """

    gpus: tuple[str, ...]
    is_dry_run: bool

    @classmethod
    def here(cls) -> Machine:
        """This machine, or the one that ``HYDRA_GPU_DRY_RUN`` pretends."""
        played = os.environ.get(DRY_RUN, "")
        if played:
            return cls(tuple(map(str, range(int(played)))), True)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            return cls(tuple(part for part in visible.split(",") if part), False)
        import torch

        return cls(tuple(map(str, range(torch.cuda.device_count()))), False)

    def environment(self, gpus: Sequence[str]) -> dict[str, str]:
        """Environment of a process that sees only these GPUs; without any: only the CPU."""
        return os.environ | {
            "CUDA_VISIBLE_DEVICES": "" if self.is_dry_run else ",".join(gpus),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1" if self.is_dry_run else "2",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }


@dataclasses.dataclass(frozen=True)
class Ended:
    """An ended process.

    Attributes:
        status: the exit status; negative: the signal that ended it.
        seconds: from its start to its end.
        log: the file with its output.
    """

    status: int
    seconds: float
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Place:
    """A job's GPUs, and the processes that it runs on them.

    Args:
        machine: whose GPUs.
        gpus: which of them.
        folder: for logs.
    """

    def __init__(self, machine: Machine, gpus: Sequence[str], folder: Path) -> None:
        self.machine, self.gpus, self.folder = machine, tuple(gpus), folder
        self.families: set[Family] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        name: str,
        words: Iterable[object],
        *,
        status: int | None = 0,
        limit: float = LIMIT_SECONDS,
        environment: Mapping[str, str] | None = None,
        meanwhile: Callable[[subprocess.Popen], None] | None = None,
    ) -> Ended:
        """Run Python with these words in the repository's root until it ends.

        Args:
            name: of the log.
            words: arguments of Python.
            status: the expected exit status; ``None``: any.
            environment: additions.
            meanwhile: called with the process while it runs; an exception from it ends the process.

        Raises:
            JobFailed: the status is another one, or the time limit was reached; all its processes are killed.
        """
        log = self.folder / f"{name}.log"
        command = [sys.executable, *map(str, words)]
        begin = time.monotonic()
        with log.open("w") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            family = Family(
                command,
                {**self.machine.environment(self.gpus), **(environment or {})},
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            self.families.add(family)
            try:
                if meanwhile is not None:
                    meanwhile(family.process)
                code = family.process.wait(limit)
            except subprocess.TimeoutExpired:
                raise JobFailed(f"{name}: not through after {limit:.0f} s\n{tail(log)}") from None
            finally:
                family.kill()
                self.families.discard(family)
        if status is not None and code != status:
            raise JobFailed(f"{name}: status {code} where {status} is due\n{tail(log)}")
        return Ended(code, time.monotonic() - begin, log)

    def ranks(self, module: str) -> list[str]:
        """The words of a command that runs a module on all GPUs of this place, one process each.

        One process needs no launcher, as the documentation says.
        """
        if len(self.gpus) == 1:
            return ["-m", module]
        return [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(self.gpus)),
            "-m", module,
        ]  # fmt: skip


def tail(log: Path, characters: int = 5000) -> str:
    """The end of a log, for a message."""
    return f"{log} ends:\n{log.read_text(errors='replace')[-characters:]}"


@dataclasses.dataclass(frozen=True)
class Job:
    """A job, which runs once.

    Attributes:
        name: of the job and its folder of logs.
        body: function that does the work; it returns the job's result.
        gpus: number of GPUs it needs; 0: it runs on the CPU.
        after: jobs that must have succeeded before.
    """

    name: str
    body: Callable[[Place], Any]
    gpus: int = 1
    after: tuple[str, ...] = ()


class Scheduler:
    """Runs each job as soon as its needs are met, in the order of the list.

    Args:
        machine: where jobs run.
        jobs: all jobs; each comes after those that it needs.
        folder: for logs; each job has its own folder in it.
    """

    def __init__(self, machine: Machine, jobs: Sequence[Job], folder: Path) -> None:
        self.machine, self.folder = machine, folder
        self.jobs = {job.name: job for job in jobs}
        self.seconds: dict[str, float] = {}
        self._wanted: list[str] = []
        self._results: dict[str, Any] = {}
        self._load = dict.fromkeys(machine.gpus, 0)
        self._changed = threading.Condition()
        self._running: dict[str, Place] = {}

    def close(self) -> None:
        """End all running jobs, because no test waits for them."""
        with self._changed:
            self._wanted = []
            for place in self._running.values():
                for family in list(place.families):
                    family.kill()

    def want(self, names: Iterable[str]) -> None:
        """Schedule jobs, with all that they need, as soon as possible."""
        with self._changed:
            needed: set[str] = set()
            for name in names:
                self._collect(name, needed)
            self._wanted = [n for n in self.jobs if n in needed | set(self._wanted)]
            self._start_what_can()

    def _collect(self, name: str, into: set[str]) -> None:
        into.add(name)
        for other in self.jobs[name].after:
            self._collect(other, into)

    def result(self, name: str) -> Any:
        """Wait until a job has ended; returns its result.

        Raises:
            JobFailed: the job has failed, or one that it needs.
        """
        self.want([name])
        with self._changed:
            self._changed.wait_for(lambda: name in self._results)
        outcome = self._results[name]
        if isinstance(outcome, JobFailed):
            raise outcome
        return outcome

    def gpus_needed(self, name: str) -> int:
        """The most GPUs that a job, or any job that it needs, takes."""
        needed: set[str] = set()
        self._collect(name, needed)
        return max(self.jobs[n].gpus for n in needed)

    # -- with the lock held -----------------------------------------------------------------------

    def _start_what_can(self) -> None:
        for name in self._wanted:
            if name in self._results or name in self._running:
                continue
            job = self.jobs[name]
            failed = [n for n in job.after if isinstance(self._results.get(n), JobFailed)]
            if failed:
                self._results[name] = JobFailed(
                    f"{name} did not run: {failed[0]} has failed: {self._results[failed[0]]}"
                )
                self._changed.notify_all()
                continue
            if any(n not in self._results for n in job.after):
                continue
            gpus = self._free_gpus(job)
            if gpus is None:
                if job.gpus > 1:
                    break  # otherwise smaller jobs behind it could delay it for ever
                continue
            self._running[name] = place = Place(self.machine, gpus, self.folder / name)
            for gpu in gpus:
                self._load[gpu] += 1
            threading.Thread(target=self._run, args=(job, place), daemon=True).start()
        if any(n in self._results for n in self._wanted):
            self._changed.notify_all()

    def _free_gpus(self, job: Job) -> list[str] | None:
        """GPUs for a job, the emptiest first; ``None``: too few are free."""
        if self.machine.is_dry_run and self._running:
            return None
        free = sorted(
            (g for g, n in self._load.items() if n < JOBS_PER_GPU), key=self._load.__getitem__
        )
        return free[: job.gpus] if len(free) >= job.gpus else None

    # ---------------------------------------------------------------------------------------------

    def _run(self, job: Job, place: Place) -> None:
        begin = time.monotonic()
        outcome: Any
        try:
            outcome = job.body(place)
        except JobFailed as error:
            outcome = error
        except BaseException as error:
            outcome = JobFailed("".join(traceback.format_exception(error)))
        with self._changed:
            self.seconds[job.name] = time.monotonic() - begin
            self._running.pop(job.name)
            self._results[job.name] = outcome
            for gpu in place.gpus:
                self._load[gpu] -= 1
            self._start_what_can()
            self._changed.notify_all()
