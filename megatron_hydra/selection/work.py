"""Chunks of work: shared out over the ranks, kept on disk, never done twice.

What a chunk computes depends on its key alone, not on which rank computes it or when. So a map is
the same for any number of ranks, and after a kill.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from megatron_hydra.errors import HydraError
from megatron_hydra.stopping import Stopped, stop_requested
from megatron_hydra.watchdog import PATIENCE, collective_timeout, feed_watchdog

_STOP_MARK = "stop"

Result = dict[str, torch.Tensor]


def is_first_rank() -> bool:
    """Whether this process is the one that writes: rank 0 of a torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


class Ranks:
    """The processes of one torchrun, or the single process there is.

    Attributes:
        rank, size: this process and their number.
        local_rank: its number on this machine.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._owns_group = self.size > 1 and not dist.is_initialized()
        if self._owns_group:
            # Only small CPU results travel, whatever computes them: gloo serves GPUs as well.
            dist.init_process_group("gloo", timeout=collective_timeout())
        self._group = None
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=collective_timeout())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def close(self) -> None:
        """Leave the process group, if it was made here."""
        if self._owns_group:
            dist.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One piece of work.

    Attributes:
        key: unique within the run; names its file.
        cost: its share of the time, in any unit common to all chunks.
        batch: number of the prompt batch it needs: chunks of one batch are computed together.
        layer: the layer it is about, or -1.
    """

    key: str
    cost: float
    batch: int
    layer: int = -1


Compute = Callable[[int, list[Chunk]], Iterator[tuple[Chunk, Result]]]
"""From a batch number and its chunks to their results, as they come."""


class WorkBench:
    """Runs chunks over all ranks and keeps their results.

    Every chunk feeds the watchdog whose block runs: a rank that hangs in one ends the work of all.

    Args:
        ranks: the processes.
        folder: where results are kept for a later start; ``None``: nowhere.
        show_progress: a bar with the remaining time on rank 0's standard error.
    """

    def __init__(
        self, ranks: Ranks, folder: Path | None = None, show_progress: bool = False
    ) -> None:
        self.ranks, self.folder = ranks, folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if ranks.rank == 0:
                (folder / _STOP_MARK).unlink(missing_ok=True)
        self._planned: dict[str, float] = {}
        self._bar = tqdm(
            total=0.0,
            disable=not show_progress or ranks.rank != 0,
            bar_format="{desc}{percentage:3.0f}%|{bar:24}| {elapsed}, {remaining} left",
            leave=False,
        )

    def plan(self, stage: str, cost: float) -> None:
        """Say what a stage will cost (all chunks), so that the remaining time counts it."""
        self._planned[stage] = cost
        self._bar.total = max(sum(self._planned.values()), float(self._bar.n), 1e-9)
        self._bar.refresh()

    def run(self, stage: str, chunks: Sequence[Chunk], compute: Compute) -> dict[str, Result]:
        """All chunks' results by key, on every rank.

        Args:
            stage: shown beside the bar.
            chunks: the same list on every rank.
        """
        self.plan(stage, sum(c.cost for c in chunks))
        self._bar.set_description(stage)
        done = self.ranks.from_first({c.key: r for c in chunks if (r := self._read(c)) is not None})
        todo = [c for c in chunks if c.key not in done]
        self._bar.update(sum(c.cost for c in chunks if c.key in done))
        mine: dict[str, Result] = {}
        batches: dict[int, list[Chunk]] = {}
        for chunk in todo[self.ranks.rank :: self.ranks.size]:
            batches.setdefault(chunk.batch, []).append(chunk)
        failure: BaseException | None = None
        try:
            self._leave_if_stopped()
            feed_watchdog()
            for batch, members in batches.items():
                for chunk, result in compute(batch, members):
                    feed_watchdog()
                    self._write(chunk, result)
                    mine[chunk.key] = result
                    # Other ranks advance at the same pace: one bar stands for all of them.
                    self._bar.update(chunk.cost * self.ranks.size)
                    self._leave_if_stopped()
        except (Exception, Stopped) as error:  # told to the other ranks, which would wait for ever
            failure = error
        feed_watchdog(PATIENCE)  # the other ranks may have longer chunks
        self._raise_together(failure)
        for part in self.ranks.gather(mine):
            done.update(part)
        return {chunk.key: done[chunk.key] for chunk in chunks}

    def _leave_if_stopped(self) -> None:
        """Stop after a chunk if this rank was asked to, or another one: they tell by a file.

        Raises:
            Stopped: all that was computed is on disk.
        """
        if self.folder is None:
            return
        mark = self.folder / _STOP_MARK
        if stop_requested():
            mark.touch()
        if mark.exists():
            raise Stopped

    def _raise_together(self, failure: BaseException | None) -> None:
        failures = self.ranks.gather(None if failure is None else repr(failure))
        if failure is not None:
            raise failure
        if repr(Stopped()) in failures:
            raise Stopped
        for rank, text in enumerate(failures):
            if text is not None:
                raise HydraError(f"rank {rank} failed: {text}")

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()

    def remove(self) -> None:
        """Delete the kept results (rank 0)."""
        if self.folder is not None and self.ranks.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            parent = self.folder.parent
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def _path(self, chunk: Chunk) -> Path:
        assert self.folder is not None
        # The hash tells keys apart that are alike once they are file names.
        readable = re.sub(r"[^\w.-]", "_", chunk.key)[:80]
        digest = hashlib.sha256(chunk.key.encode()).hexdigest()[:12]
        return self.folder / f"{readable}-{digest}.safetensors"

    def _read(self, chunk: Chunk) -> Result | None:
        if self.folder is None or self.ranks.rank != 0 or not self._path(chunk).is_file():
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
        path = self._path(chunk)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file({k: v.contiguous() for k, v in result.items()}, temporary)
        os.replace(temporary, path)
