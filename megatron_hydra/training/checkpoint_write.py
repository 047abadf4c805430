"""Write the files of one checkpoint. All ranks plan and finish it together; each rank writes its files
separately, directly or in threads during training.

We do not use the writers of Megatron and torch. They plan every save again and fork a process for it. This
takes seconds, cannot be stopped by a signal, and, if the process stays alive between saves, may write later
weights than the save's. Here all saves of a run use the plan of the first one.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_hydra.checkpoint import records, store
from megatron_hydra.checkpoint.records import Box, Place
from megatron_hydra.errors import HydraError
from megatron_hydra.ranks import on_main
from megatron_hydra.training.agreement import true_everywhere
from megatron_hydra.training.model_state import balanced_shares
from megatron_hydra.training.snapshot import Snapshot

_FILE_BYTES = 64 * 2**20
_MAX_FILES = 4
"""Maximum number of files of a rank. A separate thread writes and hashes each file."""


@dataclasses.dataclass(frozen=True)
class WritePlan:
    """The boxes that each rank writes. All saves of the same part of a run's state share one plan.

    Attributes:
        boxes: the boxes of this rank.
        files: indices into ``boxes``, file by file.
        boxes_by_rank, cover: the boxes of all ranks, by rank and by key; only on rank 0.
    """

    boxes: list[Box]
    files: list[list[int]]
    boxes_by_rank: list[list[Box]]
    cover: dict[str, list[Box]]


class CheckpointWrite:
    """One write of a checkpoint. The constructor is collective: ranks agree on the boxes of each.

    Args:
        snapshot: the tensors that this rank writes.
        common: all state except sharded tensors; only rank 0's is written.
        folder: an empty folder for the files.
        last_plan: the plan of an earlier save.

    Attributes:
        plan: the plan, for the next save.

    Raises:
        HydraError: on every rank.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        common: dict[str, Any],
        folder: Path,
        last_plan: WritePlan | None = None,
    ) -> None:
        self._snapshot, self._folder = snapshot, folder
        self._thread: threading.Thread | None = None
        self._error = ""
        self._files: list[tuple[list[Place], str]] = []
        on_main(lambda: records.write_common(folder, common))
        self.plan = self._plan(last_plan)

    def _plan(self, last: WritePlan | None) -> WritePlan:
        boxes = self._snapshot.boxes
        if true_everywhere(last is not None and last.boxes == boxes):
            assert last is not None
            return last
        is_main = dist.get_rank() == 0
        by_rank: list[Any] = [None] * dist.get_world_size() if is_main else []
        dist.gather_object(boxes, by_rank if is_main else None)
        cover: dict[str, list[Box]] = {}

        def check() -> None:  # keeps its result on rank 0
            cover.update(records.check_cover(itertools.chain.from_iterable(by_rank)))

        on_main(check)
        return WritePlan(list(boxes), _files_of([box.num_bytes for box in boxes]), by_rank, cover)

    # -- writing: ranks do not wait for each other --------------------------------------------

    def write(self) -> None:
        """Write, sync and hash this rank's files. :meth:`finish` raises the errors."""
        self._files = [([], "")] * len(self.plan.files)
        first, *others = (
            threading.Thread(target=self._write_file, args=(i,), name=f"file {i}", daemon=True)
            for i in range(len(self.plan.files))
        )
        for thread in others:
            thread.start()
        first.run()
        for thread in others:
            thread.join()

    def _write_file(self, number: int) -> None:
        path = self._folder / f"__{dist.get_rank()}_{number}.distcp"
        tensors = (self._snapshot.tensors[i] for i in self.plan.files[number])
        try:
            self._files[number] = records.write_file(path, tensors)
        except Exception as error:  # finish() raises it on all ranks; torch wraps an OSError here
            self._error = _root_cause(error)

    def start(self) -> None:
        """Run :meth:`write` in daemon threads."""
        self._thread = threading.Thread(target=self.write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether the threads are still writing."""
        return self._thread is not None and self._thread.is_alive()

    # -- finishing: collective ----------------------------------------------------------------

    def finish(self) -> dict[str, str]:
        """Wait for all ranks and complete the folder.

        Returns:
            On rank 0: name in the manifest -> SHA-256 of the files of all ranks.

        Raises:
            HydraError: on every rank, if one rank could not write.
        """
        if self._thread is not None:
            self._thread.join()
        order = [i for indices in self.plan.files for i in indices]
        places = [place for of_file, _ in self._files for place in of_file]
        by_box = dict(zip(order, places, strict=False))  # incomplete after an error
        hashes = {of_file[0].file: digest for of_file, digest in self._files if of_file}
        outcome = (self._error, [by_box.get(i) for i in range(len(order))], hashes)
        is_main = dist.get_rank() == 0
        outcomes: list[Any] | None = [None] * dist.get_world_size() if is_main else None
        dist.gather_object(outcome, outcomes)
        return on_main(lambda: self._complete(outcomes or [])) if is_main else on_main(dict)

    def _complete(self, outcomes: list[Any]) -> dict[str, str]:
        for rank, (error, _, _) in enumerate(outcomes):
            if error:
                raise HydraError(f"rank {rank}: {self._folder} cannot be written: {error}")
        places = {
            box: place
            for boxes, (_, of_rank, _) in zip(self.plan.boxes_by_rank, outcomes, strict=True)
            for box, place in zip(boxes, of_rank, strict=True)
        }
        records.write_index(self._folder, self.plan.cover, places)
        return {
            f"{store.WEIGHTS}/{name}": digest
            for _, _, hashes in outcomes
            for name, digest in hashes.items()
        }


def _files_of(sizes: list[int]) -> list[list[int]]:
    """Indices of each file, so that files have about the same size; at least one file."""
    count = max(1, min(_MAX_FILES, sum(sizes) // _FILE_BYTES))
    files: list[list[int]] = [[] for _ in range(count)]
    for i, number in enumerate(balanced_shares(sizes, count)):
        files[number].append(i)
    return files


def _root_cause(error: BaseException) -> str:
    """One line: the operating system's error that caused torch's error, if any."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
