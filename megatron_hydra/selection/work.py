"""Chunks of work: distributed over the ranks, saved on disk, never computed twice.

The result of a chunk depends only on its key, not on its rank or time. So a map is the same for any number of
ranks, and after a kill.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from megatron_hydra.errors import HydraError
from megatron_hydra.files import atomic_file
from megatron_hydra.ranks import Ranks
from megatron_hydra.selection.time_left import Stage, TimeLeft, in_words
from megatron_hydra.stopping import Stopped, stop_requested
from megatron_hydra.watchdog import PATIENCE, feed_watchdog

_STOP_MARK = "stop"

Result = dict[str, torch.Tensor]

Step = TypeVar("Step")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One piece of work.

    Attributes:
        key: unique within the run; gives the file name.
        cost: its cost (:mod:`megatron_hydra.selection.cost`), in the same unit for all chunks.
        batch: number of its prompt batch; chunks of one batch are computed together.
        layer: its layer, or -1.
        setup: cost that a process pays once for all chunks of this batch, before the first.
    """

    key: str
    cost: float
    batch: int
    layer: int = -1
    setup: float = 0.0


def shares(chunks: Sequence[Chunk], processes: int) -> list[list[Chunk]]:
    """Divide chunks among processes, so that the most expensive share is as cheap as possible.

    A share is a run of neighbours in a list sorted by batch. So neighbours share at most one batch, and
    ``processes - 1`` batches at most are set up more than once.

    Args:
        chunks: any order; chunks of one batch keep theirs.
        processes: number of shares; the last ones may be empty.
    """
    ordered = [chunk for batch in _by_batch(chunks).values() for chunk in batch]

    def filled(limit: float) -> list[list[Chunk]]:
        parts: list[list[Chunk]] = [[]]
        cost = 0.0
        for chunk in ordered:
            starts_batch = not parts[-1] or parts[-1][-1].batch != chunk.batch
            added = chunk.cost + chunk.setup * starts_batch
            if parts[-1] and cost + added > limit:
                parts.append([])
                cost, added = 0.0, chunk.cost + chunk.setup
            parts[-1].append(chunk)
            cost += added
        return parts

    # One share holds twice the cost, however sums are rounded. 60 halvings are more than a number has digits.
    low, high = 0.0, 2 * share_cost(ordered)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if len(filled(middle)) <= processes else (middle, high)
    parts = filled(high)
    return parts + [[] for _ in range(processes - len(parts))]


def _by_batch(chunks: Iterable[Chunk]) -> dict[int, list[Chunk]]:
    batches: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        batches.setdefault(chunk.batch, []).append(chunk)
    return batches


def share_cost(share: Sequence[Chunk]) -> float:
    """Cost of chunks on one process, which sets up each of their batches once."""
    setups = {chunk.batch: chunk.setup for chunk in share}
    return sum(chunk.cost for chunk in share) + sum(setups.values())


Compute = Callable[[int, list[Chunk]], Iterator[tuple[Chunk, Result]]]
"""Function from a batch number and its chunks to an iterator over their results."""


class WorkBench:
    """Runs chunks on all ranks and saves their results.

    Every chunk feeds the active watchdog. If a rank hangs in a chunk, the watchdog ends the work of all ranks.

    Args:
        ranks: the processes.
        folder: folder of results for a later start; ``None``: do not save.
        show_progress: show a bar with the time left, and messages, on rank 0's standard error.
        clock: returns the current time in seconds, to time chunks.

    Attributes:
        time_left: this process's estimate of the remaining work.
        shows: whether this process shows progress.
    """

    def __init__(
        self,
        ranks: Ranks,
        folder: Path | None = None,
        show_progress: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.ranks, self.folder = ranks, folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if ranks.rank == 0:
                (folder / _STOP_MARK).unlink(missing_ok=True)
        self.time_left = TimeLeft(ranks.size)
        self.shows = show_progress and ranks.rank == 0
        self.clock = clock
        self._shown = -float("inf")
        self._bar = tqdm(
            total=1.0,
            disable=not self.shows,
            bar_format="{desc}{percentage:3.0f}%|{bar:24}| {elapsed}{postfix}",
            leave=False,
        )

    def plan(self, stage: Stage, chunks: Sequence[Chunk]) -> None:
        """Add the chunks of a stage to the estimate of the time left; chunks on disk have no cost."""
        todo = [chunk for chunk in chunks if not self._is_saved(chunk)]
        self.time_left.plan(stage, sum(map(share_cost, shares(todo, self.ranks.size))))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.shows:
            tqdm.write(text, file=sys.stderr)

    def run(self, stage: Stage, chunks: Sequence[Chunk], compute: Compute) -> dict[str, Result]:
        """Return the results of all chunks by key, on every rank.

        Args:
            stage: the planned stage of the chunks; they may be only a part of it.
            chunks: the same list on every rank.
        """
        self._bar.set_description(str(stage), refresh=False)
        done = self.ranks.from_first({c.key: r for c in chunks if (r := self._read(c)) is not None})
        todo = [c for c in chunks if c.key not in done]
        parts = shares(todo, self.ranks.size)
        mine: dict[str, Result] = {}
        left = self.time_left.cost(stage) - sum(map(share_cost, parts))
        failure: BaseException | None = None
        try:
            self._exit_if_stopped()
            feed_watchdog()
            started = self.clock()
            for batch, members in _by_batch(parts[self.ranks.rank]).items():
                setup = members[0].setup
                for chunk, result in compute(batch, members):
                    feed_watchdog()
                    self._write(chunk, result)
                    mine[chunk.key] = result
                    now = self.clock()
                    self.time_left.done(stage, chunk.cost + setup, now - started)
                    setup = 0.0
                    self._show(now)
                    started = now
                    self._exit_if_stopped()
        except (Exception, Stopped) as error:  # the other ranks must know, or they wait forever
            failure = error
        feed_watchdog(PATIENCE)  # other ranks may have longer chunks
        self.ranks.raise_together(failure)
        for results in self.ranks.gather(mine):
            done.update(results)
        self.time_left.plan(stage, max(0.0, left))  # the actual chunks of the other ranks
        return {chunk.key: done[chunk.key] for chunk in chunks}

    # -- sequential work in one process ------------------------------------------------------------

    def follow(self, stage: Stage, steps: Iterable[Step], cost: float) -> Iterator[Step]:
        """Yield steps as they are done; after each, update the time left and feed the watchdog.

        Args:
            stage: a stage planned in :attr:`time_left`.
            cost: cost of a step.
        """
        self._bar.set_description(str(stage), refresh=False)
        feed_watchdog(PATIENCE)  # the first step may compile kernels
        started = self.clock()
        for step in steps:
            feed_watchdog()
            now = self.clock()
            self.time_left.done(stage, cost, now - started)
            self._show(now)
            yield step
            started = self.clock()

    def keep(self, name: str, state: Result) -> None:
        """Save a state for a later start; it atomically replaces the state of the same name."""
        self._write(Chunk(name, 0.0, 0), state)

    def kept(self, name: str) -> Result | None:
        """The saved state of that name from an earlier start, if any."""
        return self._read(Chunk(name, 0.0, 0))

    def _show(self, now: float) -> None:
        """Draw the bar: a few times per second on a screen, twice per minute in a file."""
        left = self.time_left.seconds()
        pause = 0.2 if sys.stderr.isatty() else 30.0
        if not self.shows or left is None or now - self._shown < pause:
            return
        self._shown = now
        self._bar.n = self.time_left.share_done
        self._bar.set_postfix_str(f"about {in_words(left)} left")

    def _exit_if_stopped(self) -> None:
        """Stop after a chunk if this or another rank received a stop request. Ranks signal it by a file.

        Raises:
            Stopped: a stop was requested; all results are on disk.
        """
        if self.folder is None:
            return
        mark = self.folder / _STOP_MARK
        if stop_requested():
            mark.touch()
        if mark.exists():
            raise Stopped

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()

    def remove(self) -> None:
        """Delete the saved results (rank 0)."""
        if self.folder is not None and self.ranks.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            parent = self.folder.parent
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def _path(self, chunk: Chunk) -> Path:
        assert self.folder is not None
        # The hash distinguishes keys that give the same file name.
        readable = re.sub(r"[^\w.-]", "_", chunk.key)[:80]
        digest = hashlib.sha256(chunk.key.encode()).hexdigest()[:12]
        return self.folder / f"{readable}-{digest}.safetensors"

    def _is_saved(self, chunk: Chunk) -> bool:
        """Whether rank 0 has a chunk's result on disk; the other ranks get the answer from rank 0."""
        return self.folder is not None and self.ranks.rank == 0 and self._path(chunk).is_file()

    def _read(self, chunk: Chunk) -> Result | None:
        if not self._is_saved(chunk):
            return None
        try:
            return load_file(self._path(chunk))
        except (OSError, SafetensorError) as error:
            raise HydraError(
                f"{self._path(chunk)} cannot be read: {error}; delete it and start again"
            ) from None

    def _write(self, chunk: Chunk, result: Result) -> None:
        if self.folder is None:
            return
        with atomic_file(self._path(chunk)) as temporary:
            save_file({k: v.contiguous() for k, v in result.items()}, temporary)
