"""Checkpoints of a run: atomic, independent of the layout, and sufficient for a bit-exact resume.

::

    <output>/checkpoints/latest            name of the newest complete checkpoint
    <output>/checkpoints/step_00000100/    model.json, weights/, tokenizer/, manifest.json, as in any
        checkpoint; weights/ also holds optimizer and generators
        training.json                      step, tokens, data position, faults, layout, config

A checkpoint is written to a temporary folder, hashed, synced to disk and renamed. Then ``latest`` is
updated. A background save (``checkpoint.asynchronous``) does the same steps, only later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

from megatron_hydra.checkpoint import store
from megatron_hydra.config.loading import to_dict
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import OptimizerConfig, RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.files import JsonFormat, sync, sync_tree, write_text_atomic
from megatron_hydra.parallel.world import World
from megatron_hydra.ranks import on_main
from megatron_hydra.training.agreement import on_all
from megatron_hydra.training.checkpoint_write import CheckpointWrite, WritePlan
from megatron_hydra.training.host_memory import HostMemory
from megatron_hydra.training.megatron_fixes import allocate_optimizer_state, has_state
from megatron_hydra.training.model_state import (
    SHARDING,
    load_state,
    model_state,
    set_model_state,
    sharding_metadata,
)
from megatron_hydra.training.optimizer_state import add_optimizer_state
from megatron_hydra.training.provenance import OTHER_RUN, Provenance
from megatron_hydra.training.random_state import capture_random_state, restore_random_state
from megatron_hydra.training.resume_rules import Change, refuse_changes, replicas_changed
from megatron_hydra.training.run_folder import (
    CHECKPOINTS,
    checkpoint_name,
    discard,
    find_resume_point,
    retain,
)
from megatron_hydra.training.setup import apply_settings
from megatron_hydra.training.snapshot import Snapshot

TRAINING_FILE = "training.json"
TRAINING = JsonFormat("megatron-hydra-training", 2, "training state")


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        step: steps done.
        tokens: tokens read, padding included.
        faults: state of the :class:`~.faults.FaultTracker`, JSON.
        validation: state of the :class:`~.validation.Validation`, JSON.
        ended: reason for the end of the run; empty if it has not ended.
    """

    step: int
    tokens: int
    faults: dict[str, Any] = dataclasses.field(default_factory=dict)
    validation: dict[str, Any] = dataclasses.field(default_factory=dict)
    ended: str = ""


# -- a run's checkpoints --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A save in progress: final folder, file writer, and the last steps of rank 0."""

    final: Path
    write: CheckpointWrite
    publish: Callable[[dict[str, str]], None]


class RunCheckpoints:
    """Saves and resumes one run.

    Args:
        config: the run.
        world: this rank.
        model: the student's config to save.
        chunks: the student's model chunks, without wrappers.
        optimizer: the student's optimizer.
        provenance: origin of the weights, for the manifest.

    Attributes:
        changes: keys whose values differ from the config of the checkpoint that the run resumed from.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        model: ModelConfig,
        chunks: list[GPTModel],
        optimizer: MegatronOptimizer,
        provenance: Provenance,
    ) -> None:
        self.config, self.world, self.model = config, world, model
        self.chunks, self.optimizer, self.provenance = chunks, optimizer, provenance
        self.folder = Path(config.output) / CHECKPOINTS
        self.changes: list[Change] = []
        self._pending: _Pending | None = None
        self._plan: WritePlan | None = None
        self._memory = HostMemory()
        self.tokenizer = store.tokenizer_folder(config.student.checkpoint)

    # -- saving -------------------------------------------------------------------------------

    def save(self, progress: Progress, data_state: dict[str, Any]) -> Path:
        """Save a checkpoint, or start a background save; returns its folder. Collective.

        With ``checkpoint.asynchronous`` the files are written by a thread, and the checkpoint exists
        when :meth:`finish` has returned: call it when :attr:`is_writing` is false on every rank.

        Raises:
            HydraError: on every rank, if the checkpoint cannot be written or a weight is not finite.
                Earlier checkpoints are untouched.
        """
        self.finish()
        final = self.folder / checkpoint_name(progress.step)
        temporary = self.folder / f".{final.name}.tmp"
        on_all(self._check_finite)
        on_main(lambda: self._make_temporary_folder(temporary, final))
        with_optimizer = self._saves_optimizer(progress) and has_state(self.optimizer)
        snapshot, common = self._snapshot(with_optimizer)
        body = {
            **TRAINING.add_header({}),
            "verb": self.config.verb,
            **dataclasses.asdict(progress),
            "data": data_state,
            "optimizer": with_optimizer,
            "world": dataclasses.asdict(self.world) | {"rank": 0},
            "config": to_dict(self.config),
        }
        record = self.provenance.record(
            self.config, progress.step, progress.tokens, progress.validation, progress.ended,
            {key: data_state[key] for key in ("sources", "spans")},
        )  # fmt: skip
        publish = functools.partial(self._publish, temporary, final, body, record)
        with self._remove_on_failure(temporary):
            write = CheckpointWrite(snapshot, common, temporary / store.WEIGHTS, self._plan)
        self._plan = write.plan
        self._pending = _Pending(final, write, publish)
        if self.config.checkpoint.asynchronous:
            write.start()
        else:
            write.write()
            self.finish()
        return final

    @property
    def is_pending(self) -> bool:
        """Whether a background save is not complete (the same on every rank)."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing its files."""
        return self._pending is not None and self._pending.write.is_writing

    def finish(self) -> Path | None:
        """Wait for a background save and complete it; returns its folder, if any. Collective.

        Raises:
            HydraError: on every rank, if the checkpoint could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        with self._remove_on_failure(self.folder / f".{pending.final.name}.tmp"):
            hashes = pending.write.finish()
            on_main(lambda: pending.publish(hashes))
        return pending.final

    @contextlib.contextmanager
    def _remove_on_failure(self, temporary: Path) -> Iterator[None]:
        """Delete an unfinished checkpoint on failure (the disk may be full)."""
        try:
            yield
        except HydraError as error:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise HydraError(f"{error}; earlier checkpoints are untouched") from None

    def _saves_optimizer(self, progress: Progress) -> bool:
        """Whether to save the optimizer; only the last checkpoint may omit it, others must be resumable."""
        return self.config.checkpoint.save_optimizer or not progress.ended

    def _make_temporary_folder(self, temporary: Path, final: Path) -> None:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()  # not its parents: do not recreate a run folder that has disappeared
            (temporary / store.WEIGHTS).mkdir()
        except OSError as error:
            raise HydraError(
                f"checkpoint {final} cannot be written: {error}; earlier checkpoints are untouched"
            ) from None

    def _check_finite(self) -> None:
        """Raise if weights or optimizer state of this rank are not finite: they are never saved."""
        assert isinstance(self.optimizer, ChainedOptimizer)
        tensors = {
            name: parameter.data
            for chunk in self.chunks
            for name, parameter in chunk.named_parameters()
        }
        for i, part in enumerate(self.optimizer.chained_optimizers):
            for j, state in enumerate(part.optimizer.state.values() if part.optimizer else ()):
                for key, value in state.items():
                    if isinstance(value, torch.Tensor):
                        tensors[f"optimizer {i}, parameter {j}, {key}"] = value
        bad = first_non_finite(tensors)
        if bad:
            raise HydraError(f"{bad} is not finite: the checkpoint is not saved")

    def _snapshot(self, with_optimizer: bool) -> tuple[Snapshot, dict[str, Any]]:
        """Collect the tensors that this rank writes, and the non-tensor state. Collective."""
        snapshot = Snapshot(self._memory, copying=self.config.checkpoint.asynchronous)
        model = model_state(self.chunks)
        snapshot.add(model)
        common: dict[str, Any] = {"content_metadata": dict(SHARDING)}
        if with_optimizer:
            common["optimizer"] = add_optimizer_state(self.optimizer, model, snapshot)
        snapshot.add(self._random_state())
        snapshot.wait()
        return snapshot, common

    def _random_state(self) -> ShardedTensor:
        packed = capture_random_state()[None]
        place = (0, self.world.rank, self.world.size)
        return ShardedTensor.from_rank_offsets("rng_state", packed, place)

    def _publish(
        self,
        temporary: Path,
        final: Path,
        body: dict[str, Any],
        provenance: dict[str, Any],
        hashes: dict[str, str],
    ) -> None:
        """On rank 0: write small files and hashes, rename, update ``latest``, delete old checkpoints."""
        store.write_model_config(temporary, self.model)
        if self.tokenizer is not None:
            shutil.copytree(self.tokenizer, temporary / store.TOKENIZER)
        (temporary / TRAINING_FILE).write_text(json.dumps(body, indent=1) + "\n")
        store.write_manifest(temporary, provenance, hashes)
        sync_tree(temporary)
        if final.exists():  # from an attempt that resumed from an earlier step
            discard(final)
        temporary.rename(final)
        sync(self.folder)
        write_text_atomic(self.folder / store.LATEST_FILE, final.name + "\n")
        retain(self.folder, final, self.config.checkpoint.keep)

    # -- resuming -----------------------------------------------------------------------------

    def find(self) -> Path | None:
        """Find and verify the checkpoint to resume from; ``None`` for a new run. Collective.

        Raises:
            HydraError: a checkpoint exists and ``checkpoint.resume`` is ``never``, or it is damaged.
        """
        found = on_main(lambda: find_resume_point(self.folder, self.config.checkpoint.resume))
        return None if found is None else Path(found)

    def resume(
        self, folder: Path, take_up: Callable[[dict[str, Any]], tuple[int, dict[str, Any], str]]
    ) -> Progress:
        """Load everything from one of this run's checkpoints. Collective.

        Args:
            take_up: function of ``training.json`` that restores data position and held-out losses, or
                refuses them. It returns the step, the losses' state, and the reason for the end of the run
                (empty if it has not ended).

        Raises:
            HydraError: verb, model, student, teacher, data or another fixed key has changed, or the
                checkpoint was saved without its optimizer.
        """
        body = on_main(lambda: _read_training(folder))
        if body["verb"] != self.config.verb:
            raise HydraError(
                f"{folder} was made by verb {body['verb']}, this run is {self.config.verb}: choose "
                "another output"
            )
        self.changes = refuse_changes(body["config"], self.config)
        on_main(lambda: self._check_same_inputs(folder))
        self.changes += replicas_changed(body["world"]["dp_size"], self.world.dp_size)
        step, validation, ended = take_up(body)
        # Before its first update the optimizer has no state.
        was_updated = step > body["faults"].get("skipped", 0)
        if was_updated and not (body["optimizer"] or ended):
            raise HydraError(
                f"{folder} was saved with checkpoint.save_optimizer=false and cannot be resumed; "
                "start a new run from it with student.checkpoint"
            )
        self._load(folder, body)
        return Progress(step, body["tokens"], body["faults"], validation, ended)

    def _check_same_inputs(self, folder: Path) -> None:
        """Check that the checkpoint has this run's model, and was trained from this run's inputs."""
        saved = store.read_model_config(folder)
        for field in dataclasses.fields(ModelConfig):
            if getattr(saved, field.name) != getattr(self.model, field.name):
                raise HydraError(
                    f"cannot resume from {folder}: {field.name} of its student differs from "
                    f"{self.config.student.checkpoint}, this run's student; {OTHER_RUN}"
                )
        self.provenance.refuse_other_inputs(folder)

    def _load(self, folder: Path, body: dict[str, Any]) -> None:
        state: dict[str, Any] = dict(model_state(self.chunks))
        if body["optimizer"]:
            allocate_optimizer_state(self.optimizer)
            # Megatron-Core 0.19 identifies a saved parameter group also by its learning rates.
            apply_settings(self.optimizer, _saved_settings(body))
            state["optimizer"] = self.optimizer.sharded_state_dict(
                state, is_loading=True, metadata=sharding_metadata()
            )
        random_state = self._random_state()
        same_generators = on_main(lambda: _has_tensor(folder, random_state))
        if same_generators:
            state["rng_state"] = random_state
        loaded = load_state(state, folder)
        set_model_state(self.chunks, loaded)
        if body["optimizer"]:
            self.optimizer.load_state_dict(loaded["optimizer"])
        else:
            self.optimizer.reload_model_params()
        if same_generators:
            restore_random_state(loaded["rng_state"][0])


def _saved_settings(body: dict[str, Any]) -> OptimizerConfig:
    """Optimizer settings of a checkpoint's config; keys added later have their defaults."""
    saved = body["config"].get("optimizer", {})
    return dataclasses.replace(
        OptimizerConfig(),
        **{f.name: saved[f.name] for f in dataclasses.fields(OptimizerConfig) if f.name in saved},
    )


def _has_tensor(folder: Path, tensor: ShardedTensor) -> bool:
    """Whether the checkpoint has this tensor in this shape. Generators depend on ranks and devices."""
    entries: dict[str, Any] = store.read_index(folder / store.WEIGHTS).state_dict_metadata
    return tensor.key in entries and tuple(entries[tensor.key].size) == tensor.global_shape


def first_non_finite(tensors: dict[str, torch.Tensor]) -> str:
    """Name of the first tensor with NaN or infinity, or an empty text.

    Tensors may be on several devices (an optimizer counts its steps on the host). Integer tensors are
    skipped.
    """
    extremes: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.itemsize == 1:  # FP8 has no comparison
            tensor = tensor.float()
        # One pass without new tensors: min and max return NaN and infinities.
        low, high = tensor.aminmax()
        extremes.setdefault(tensor.device, {})[name] = torch.stack((low, high)).double()
    bad = set()
    for of_device in extremes.values():
        finite = torch.stack(list(of_device.values())).isfinite().all(1).tolist()
        bad |= {name for name, ok in zip(of_device, finite, strict=True) if not ok}
    return next((name for name in tensors if name in bad), "")


def _read_training(folder: Path) -> dict[str, Any]:
    path = folder / TRAINING_FILE
    return TRAINING.read(path)
