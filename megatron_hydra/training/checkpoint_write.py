"""One checkpoint's files on their way to the disk: planned and finished by all ranks together,
written by each rank alone, at once or in a thread while training goes on.

The files are those of Megatron's ``torch_dist`` format. Its own writers fork a process for every
save, which costs seconds, cannot be stopped by a signal, and (kept alive between saves) may write later
weights than those of the save.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_hydra.checkpoint import store
from megatron_hydra.errors import HydraError
from megatron_hydra.training.agreement import on_main

_FORMAT = ("torch_dist", 1)


class CheckpointWrite:
    """Making one is collective: ranks agree on who writes what.

    Args:
        state: Megatron's sharded state dict.
        folder: an empty folder for the files.
        snapshot: copy the tensors to the host now, so that they may change while they are written.

    Raises:
        HydraError: on every rank.
    """

    def __init__(self, state: dict[str, Any], folder: Path, *, snapshot: bool) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._error = ""
        self._results: list[Any] = []
        self._hashes: dict[str, str] = {}
        sharded, common = save_preprocess(state, True)
        on_main(lambda: _save_common(common, folder))
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        if snapshot:
            for tensor in _tensors(flat):
                tensor.data = tensor.data.detach().to("cpu", copy=True)
        self._plan(mcore_to_pyt_state_dict(flat, False))

    def _plan(self, state: dict[str, Any]) -> None:
        ranks = _DistWrapper(None, True, 0)
        self._writer = writer = dcp.FileSystemWriter(self._folder, sync_files=True)
        self._planner = planner = MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False
        )
        self._metadata: Any = None

        def own_plan() -> Any:
            planner.set_up_planner(state, writer.storage_meta(), ranks.is_coordinator)
            writer.set_up_storage_writer(ranks.is_coordinator)
            return writer.prepare_local_plan(planner.create_local_plan())

        def everyones_plan(plans: list[Any]) -> list[Any]:
            plans, self._metadata = planner.create_global_plan(plans)
            return writer.prepare_global_plan(plans)

        try:
            plan = ranks.reduce_scatter("plan", own_plan, everyones_plan)
        except dcp.api.CheckpointException as report:
            error = next(iter(report.failures.values()))[0]
            raise HydraError(f"{self._folder} cannot be written: {error}") from None
        self._final_plan = planner.finish_plan(plan)

    # -- writing: no rank waits for another ---------------------------------------------------

    def write(self) -> None:
        """Write this rank's files, durably, and hash them. Errors wait for :meth:`finish`."""
        try:
            self._results = self._writer.write_data(self._final_plan, self._planner).value()
            names = {result.storage_data.relative_path for result in self._results}
            self._hashes = {
                f"{store.WEIGHTS}/{name}": store.sha256_of_file(self._folder / name)
                for name in names
            }
        except Exception as error:  # told to all ranks by finish(); torch hides an OSError here
            self._error = _root_cause(error)

    def start(self) -> None:
        """:meth:`write` in a thread, which dies with the process."""
        self._thread = threading.Thread(target=self.write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether the thread is still at it."""
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
        outcome = (self._error, self._results, self._hashes)
        is_main = dist.get_rank() == 0
        outcomes: list[Any] | None = [None] * dist.get_world_size() if is_main else None
        dist.gather_object(outcome, outcomes)
        return on_main(lambda: self._complete(outcomes or [])) if is_main else on_main(dict)

    def _complete(self, outcomes: list[Any]) -> dict[str, str]:
        for rank, (error, _, _) in enumerate(outcomes):
            if error:
                raise HydraError(f"rank {rank}: {self._folder} cannot be written: {error}")
        self._writer.finish(self._metadata, [results for _, results, _ in outcomes])
        save_config(CheckpointingConfig(*_FORMAT), str(self._folder))
        return {name: digest for _, _, hashes in outcomes for name, digest in hashes.items()}


def _save_common(common: dict[str, Any], folder: Path) -> None:
    """What is no tensor. Given a path, torch would hide what the operating system says of it."""
    buffer = io.BytesIO()
    torch.save(common, buffer)
    (folder / COMMON_STATE_FNAME).write_bytes(buffer.getbuffer())


def _tensors(state: Any) -> Iterator[ShardedTensor]:
    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)


def _root_cause(error: BaseException) -> str:
    """The operating system's error behind torch's, if there is one, as one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
