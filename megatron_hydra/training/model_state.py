"""The model's part of a checkpoint: what ranks save and load of it, under any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel

from megatron_hydra.checkpoint import store
from megatron_hydra.errors import HydraError
from megatron_hydra.training.agreement import on_main
from megatron_hydra.training.provenance import checkpoint_fingerprint

SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
"""How optimizer state is cut, in Megatron's words: so that any layout can load it."""


def sharding_metadata() -> dict[str, Any]:
    """:data:`SHARDING` with the group that replicates weights."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return SHARDING | {"dp_cp_group": group}


def model_state(chunks: list[GPTModel]) -> dict[str, Any]:
    """Sharded tensors only: the layers' extra states are pickles for FP8, which nothing here uses."""
    return {
        f"model{i}": {
            name: entry
            for name, entry in chunk.sharded_state_dict(metadata=sharding_metadata()).items()
            if not name.endswith("_extra_state")
        }
        for i, chunk in enumerate(chunks)
    }


def set_model_state(chunks: list[GPTModel], loaded: dict[str, Any]) -> None:
    """Inverse of :func:`model_state`, from what Megatron loaded."""
    for i, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{i}"], strict=False)
        wrong = [name for name in missing if not name.endswith("_extra_state")] + unexpected
        if wrong:
            raise RuntimeError(f"model chunk {i} and its own state dict differ in {wrong[0]}")


def verified_checkpoint(path: str, fingerprint: str = "") -> Path:
    """Resolve a checkpoint and check it, on rank 0 for all. Nothing of it is opened before.

    Args:
        path: the folder, or a run's ``checkpoints``.
        fingerprint: what :func:`~.provenance.checkpoint_fingerprint` must be; empty: anything.

    Raises:
        HydraError: on every rank, if there is none, if it is damaged, or if it is another one.
    """

    def check() -> str:
        folder = store.resolve_checkpoint(path)
        found = checkpoint_fingerprint(folder)
        if fingerprint and found != fingerprint:
            raise HydraError(
                f"{folder} has fingerprint {found}, the config asks for {fingerprint}: it is "
                "another checkpoint"
            )
        store.verify_checkpoint(folder)
        store.stored_tensors(folder)  # the index is complete for its model
        return str(folder)

    return Path(on_main(check))


def load_model(chunks: list[GPTModel], folder: Path) -> None:
    """Fill a freshly built model from a verified checkpoint. Every stored tensor must be used.

    Raises:
        HydraError: a tensor of the checkpoint is read by no rank.
    """
    state = model_state(chunks)
    _check_all_used(state, folder)
    set_model_state(chunks, load_state(state, folder))


def load_state(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Megatron's load of a verified checkpoint.

    Raises:
        HydraError: what went wrong on the first rank where something did.
    """
    weights = folder / store.WEIGHTS
    with store.plain_failures(weights):
        return dist_checkpointing.load(state, str(weights))


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
