"""One checkpoint's files on their way to the disk: planned and finished by all ranks together,
written by each rank alone, at once or in threads while training goes on.

Megatron's and torch's own writers plan every save again and fork a process for it, which costs seconds,
cannot be stopped by a signal, and (kept alive between saves) may write later weights than those of the
save. Here the plan of a run's first save is kept for the others.
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
from megatron_hydra.training.agreement import on_main, true_everywhere
from megatron_hydra.training.model_state import dealt
from megatron_hydra.training.snapshot import Snapshot

_FILE_BYTES = 64 * 2**20
_MAX_FILES = 4
"""Files of a rank, each written and hashed by a thread of its own; small ranks have fewer."""


@dataclasses.dataclass(frozen=True)
class WritePlan:
    """Who writes what; the same for all saves of a run with the same part of its state.

    Attributes:
        boxes: what this rank writes.
        files: the same as indices into ``boxes``, file by file.
        boxes_by_rank, cover: everybody's, and by key; known on rank 0 only.
    """

    boxes: list[Box]
    files: list[list[int]]
    boxes_by_rank: list[list[Box]]
    cover: dict[str, list[Box]]


class CheckpointWrite:
    """Making one is collective: ranks agree on who writes what.

    Args:
        snapshot: what this rank writes.
        common: what is not a sharded tensor; rank 0's is written.
        folder: an empty folder for the files.
        last_plan: of an earlier save.

    Attributes:
        plan: for the next save.

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

        def check() -> None:  # its result stays where it is needed
            cover.update(records.check_cover(itertools.chain.from_iterable(by_rank)))

        on_main(check)
        return WritePlan(list(boxes), _files_of([box.num_bytes for box in boxes]), by_rank, cover)

    # -- writing: no rank waits for another ---------------------------------------------------

    def write(self) -> None:
        """Write this rank's files, durably, and hash them. Errors wait for :meth:`finish`."""
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
        except Exception as error:  # told to all ranks by finish(); torch hides an OSError here
            self._error = _root_cause(error)

    def start(self) -> None:
        """:meth:`write` in threads, which die with the process."""
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
            On rank 0 the SHA-256 of every rank's files by name in the manifest.

        Raises:
            HydraError: on every rank, if some rank could not write.
        """
        if self._thread is not None:
            self._thread.join()
        order = [i for indices in self.plan.files for i in indices]
        places = [place for of_file, _ in self._files for place in of_file]
        by_box = dict(zip(order, places, strict=False))  # incomplete, if there was an error
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
    """Indices by file, so that files are of about the same size; at least one file."""
    count = max(1, min(_MAX_FILES, sum(sizes) // _FILE_BYTES))
    files: list[list[int]] = [[] for _ in range(count)]
    for i, number in enumerate(dealt(sizes, count)):
        files[number].append(i)
    return files


def _root_cause(error: BaseException) -> str:
    """The operating system's error behind torch's, if there is one, as one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
