"""Checkpoints of a run: complete or invisible, free of the layout, enough to go on bit-exactly.

::

    <output>/checkpoints/latest            name of the newest complete checkpoint
    <output>/checkpoints/step_00000100/    model.json, weights/, tokenizer/, manifest.json, as any
                                           checkpoint; weights/ also holds optimizer and generators
        training.json                      step, tokens, data position, layout, config

A checkpoint is written beside its final place, hashed, renamed, and only then does ``latest`` move.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed import checkpoint as dcp

from megatron_hydra.checkpoint import store
from megatron_hydra.checkpoint.atomic import write_text_atomic
from megatron_hydra.config.loading import to_dict
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.parallel.world import World
from megatron_hydra.training.agreement import on_main
from megatron_hydra.training.megatron_fixes import allocate_optimizer_state, has_state
from megatron_hydra.training.random_state import capture_random_state, restore_random_state

CHECKPOINTS = "checkpoints"
TRAINING_FILE = "training.json"
TRAINING_FORMAT, TRAINING_VERSION = "megatron-hydra-training", 1
_STEP_PREFIX = "step_"
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


class _DirectStrategy(SaveShardedStrategy):
    """``torch_dist`` files written by this process itself.

    Megatron's own strategy forks writers for every save, which costs seconds and cannot be stopped
    by a signal; the files are the same.
    """

    can_handle_sharded_objects = True

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp.save(
            mcore_to_pyt_state_dict(flat, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come: ``step`` steps, ``tokens`` tokens (padding included)."""

    step: int
    tokens: int


# -- names ----------------------------------------------------------------------------------------


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"{_STEP_PREFIX}{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first (unfinished ones have other names)."""
    found = folder.glob(f"{_STEP_PREFIX}[0-9]*") if folder.is_dir() else iter(())
    return sorted(path for path in found if (path / store.MANIFEST_FILE).is_file())


# -- model weights --------------------------------------------------------------------------------


def _metadata() -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return _SHARDING | {"dp_cp_group": group}


def _model_state(chunks: list[GPTModel]) -> dict[str, Any]:
    """Tensors only: the layers' extra states are pickles for FP8, which nothing here uses."""
    return {
        f"model{i}": {
            name: entry
            for name, entry in chunk.sharded_state_dict(metadata=_metadata()).items()
            if not name.endswith("_extra_state")
        }
        for i, chunk in enumerate(chunks)
    }


def _set_model_state(chunks: list[GPTModel], loaded: dict[str, Any]) -> None:
    for i, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{i}"], strict=False)
        wrong = [name for name in missing if not name.endswith("_extra_state")] + unexpected
        if wrong:
            raise RuntimeError(f"model chunk {i} and its own state dict differ in {wrong[0]}")


def verified_checkpoint(path: str) -> Path:
    """Resolve a checkpoint and check its manifest, on rank 0 for all.

    Raises:
        HydraError: on every rank, if there is none or if it is damaged.
    """

    def check() -> str:
        folder = store.resolve_checkpoint(path)
        store.verify_manifest(folder)
        store.stored_tensors(folder)  # the index is one of ours, and complete for its model
        return str(folder)

    return Path(on_main(check))


def load_model(chunks: list[GPTModel], folder: Path) -> None:
    """Fill a freshly built model from a verified checkpoint. Every stored tensor must be used.

    Raises:
        HydraError: a tensor of the checkpoint is read by no rank.
    """
    state = _model_state(chunks)
    _check_all_used(state, folder)
    _set_model_state(chunks, dist_checkpointing.load(state, str(folder / store.WEIGHTS)))


def _check_all_used(state: dict[str, Any], folder: Path) -> None:
    asked = sorted({tensor.key for tensor in _sharded_tensors(state)})
    everywhere: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, asked)
    used = {key for keys in everywhere for key in keys}
    stored = set(on_main(lambda: sorted(store.stored_tensors(folder))))
    for key in sorted(stored ^ used):
        where = "holds, but no rank reads" if key in stored else "lacks"
        raise HydraError(f"{folder}: the checkpoint {where} {key!r}")


def _sharded_tensors(state: Any) -> list[ShardedTensor]:
    """All ShardedTensors in nested state, factories expanded."""
    if isinstance(state, ShardedTensor):
        return [state]
    if isinstance(state, dict):
        return [t for value in state.values() for t in _sharded_tensors(value)]
    if isinstance(state, (list, tuple)):
        return [t for value in state for t in _sharded_tensors(value)]
    build = getattr(state, "build", None)
    return _sharded_tensors(build()) if callable(build) else []


# -- a run's checkpoints --------------------------------------------------------------------------


class RunCheckpoints:
    """Saves and resumes one run.

    Args:
        config: the run.
        world: this rank.
        model: the student's config, as it is to be saved.
        chunks: the student's model chunks, without wrappers.
        optimizer: its optimizer.
        provenance: makes the manifest's record of where the weights come from.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        model: ModelConfig,
        chunks: list[GPTModel],
        optimizer: MegatronOptimizer,
        provenance: Callable[[Progress], dict[str, Any]],
    ) -> None:
        self.config, self.world, self.model = config, world, model
        self.chunks, self.optimizer, self.provenance = chunks, optimizer, provenance
        self.folder = Path(config.output) / CHECKPOINTS
        self.tokenizer = store.tokenizer_folder(config.student.checkpoint)

    # -- saving -------------------------------------------------------------------------------

    def save(self, progress: Progress, data_state: dict[str, Any]) -> Path:
        """Write the checkpoint of a step; returns its folder. Collective.

        Raises:
            HydraError: on every rank, if it cannot be written; earlier checkpoints are untouched.
        """
        final = self.folder / checkpoint_name(progress.step)
        temporary = self.folder / f".{final.name}.tmp"
        on_main(lambda: _fresh_folder(temporary / store.WEIGHTS))
        with_optimizer = self.config.checkpoint.save_optimizer and has_state(self.optimizer)
        state = self._state(with_optimizer, is_loading=False)
        try:
            dist_checkpointing.save(
                state,
                str(temporary / store.WEIGHTS),
                _DirectStrategy("torch_dist", 1),
                content_metadata=dict(_SHARDING),
            )
        except (dcp.api.CheckpointException, OSError) as error:
            raise HydraError(f"checkpoint {final} cannot be written: {error}") from None
        on_main(lambda: self._publish(temporary, final, progress, data_state, with_optimizer))
        return final

    def _state(self, with_optimizer: bool, is_loading: bool) -> dict[str, Any]:
        model = _model_state(self.chunks)
        state = dict(model)
        if with_optimizer:
            state["optimizer"] = self.optimizer.sharded_state_dict(
                model, is_loading=is_loading, metadata=_metadata()
            )
        packed = capture_random_state()[None]
        place = (0, self.world.rank, self.world.size)
        state["rng_state"] = ShardedTensor.from_rank_offsets("rng_state", packed, place)
        return state

    def _publish(
        self,
        temporary: Path,
        final: Path,
        progress: Progress,
        data_state: dict[str, Any],
        with_optimizer: bool,
    ) -> None:
        """Rank 0: the small files, the hashes, the name, the pointer, the retention, in order."""
        store.write_model_config(temporary, self.model)
        if self.tokenizer is not None:
            shutil.copytree(self.tokenizer, temporary / store.TOKENIZER)
        body = {
            "format": TRAINING_FORMAT,
            "version": TRAINING_VERSION,
            "verb": self.config.verb,
            **dataclasses.asdict(progress),
            "data": data_state,
            "optimizer": with_optimizer,
            "world": dataclasses.asdict(self.world) | {"rank": 0},
            "config": to_dict(self.config),
        }
        (temporary / TRAINING_FILE).write_text(json.dumps(body, indent=1) + "\n")
        store.write_manifest(temporary, self.provenance(progress))
        for file in (temporary / TRAINING_FILE, temporary / store.MANIFEST_FILE, temporary):
            _sync(file)
        if final.exists():  # a step that is saved again after a resume without its checkpoint
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(self.folder)
        write_text_atomic(self.folder / store.LATEST_FILE, final.name + "\n")
        _sync(self.folder)
        self._retain(final)

    def _retain(self, newest: Path) -> None:
        keep = self.config.checkpoint.keep
        old = [path for path in step_folders(self.folder) if path != newest]
        for path in old[: max(0, len(old) + 1 - keep)] if keep else []:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = path.with_name(f".{path.name}.old")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    # -- resuming -----------------------------------------------------------------------------

    def find(self) -> Path | None:
        """The checkpoint to go on from, verified; ``None`` for a new run. Collective.

        Raises:
            HydraError: there is one and ``checkpoint.resume`` is ``never``, or it is damaged.
        """
        found = on_main(self._find)
        return None if found is None else Path(found)

    def _find(self) -> str | None:
        for leftover in self.folder.glob(f".{_STEP_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folders = step_folders(self.folder)
        resume = self.config.checkpoint.resume
        if not folders and not (self.folder / store.LATEST_FILE).exists():
            return None
        if resume == "never":
            raise HydraError(
                f"{self.folder} already holds checkpoints and checkpoint.resume is 'never': choose "
                "another output, or checkpoint.resume=auto to go on"
            )
        if resume == "fallback":
            return str(_newest_good(folders))
        folder = store.resolve_checkpoint(self.folder)
        try:
            store.verify_manifest(folder)
        except HydraError as error:
            raise HydraError(
                f"{error}; checkpoint.resume=fallback goes on from the newest undamaged checkpoint"
            ) from None
        return str(folder)

    def resume(self, folder: Path, check_data: Callable[[dict[str, Any]], int]) -> Progress:
        """Load everything from one of this run's checkpoints. Collective.

        Args:
            check_data: refuses a data position that does not fit; returns its step.

        Raises:
            HydraError: another verb or other data, or a checkpoint saved without its optimizer.
        """
        body = on_main(lambda: _read_training(folder))
        if body["verb"] != self.config.verb:
            raise HydraError(
                f"{folder} was made by verb {body['verb']}, this run is {self.config.verb}: choose "
                "another output"
            )
        step = check_data(body["data"])
        is_finished = step >= self.config.schedule.steps
        saves_optimizer = body["config"]["checkpoint"]["save_optimizer"]
        if not (body["optimizer"] or saves_optimizer or is_finished):
            raise HydraError(
                f"{folder} was saved with checkpoint.save_optimizer=false and cannot be resumed; "
                "start a new run from it with student.checkpoint"
            )
        self._load(folder, body)
        return Progress(step=step, tokens=body["tokens"])

    def _load(self, folder: Path, body: dict[str, Any]) -> None:
        if body["optimizer"]:
            allocate_optimizer_state(self.optimizer)
        state = self._state(body["optimizer"], is_loading=True)
        same_world = body["world"]["size"] == self.world.size
        if not same_world:
            del state["rng_state"]
        loaded = dist_checkpointing.load(state, str(folder / store.WEIGHTS))
        _set_model_state(self.chunks, loaded)
        if body["optimizer"]:
            self.optimizer.load_state_dict(loaded["optimizer"])
        else:
            self.optimizer.reload_model_params()
        if same_world:
            restore_random_state(loaded["rng_state"][0])


def _fresh_folder(path: Path) -> None:
    shutil.rmtree(path.parent, ignore_errors=True)
    path.mkdir(parents=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _newest_good(folders: list[Path]) -> Path:
    for folder in reversed(folders):
        try:
            store.verify_manifest(folder)
            return folder
        except HydraError:
            continue
    raise HydraError(f"none of the {len(folders)} checkpoints in this run's folder is undamaged")


def _read_training(folder: Path) -> dict[str, Any]:
    path = folder / TRAINING_FILE
    try:
        body = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise HydraError(f"{path} cannot be read: {error}") from None
    if body.get("format") != TRAINING_FORMAT or body.get("version") != TRAINING_VERSION:
        raise HydraError(f"{path} is no version {TRAINING_VERSION} training state")
    return body
