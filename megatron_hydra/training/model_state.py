"""The model's part of a checkpoint: the tensors that ranks save and load, under any layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.models.gpt import GPTModel

from megatron_hydra.checkpoint import store
from megatron_hydra.checkpoint.sharded import load_sharded, sharded_tensors
from megatron_hydra.errors import HydraError
from megatron_hydra.parallel.vocabulary import VOCABULARY_WEIGHTS
from megatron_hydra.ranks import on_main
from megatron_hydra.training.agreement import on_all
from megatron_hydra.training.provenance import checkpoint_fingerprint

SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
"""Megatron's name of the optimizer sharding that any layout can load."""


def sharding_metadata() -> dict[str, Any]:
    """:data:`SHARDING` with the group that replicates weights."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return SHARDING | {"dp_cp_group": group}


def model_state(chunks: list[GPTModel]) -> dict[str, Any]:
    """Sharded tensors only, without the layers' extra states: these are pickles for FP8, which we do not use.

    Data-parallel ranks hold equal weights. Each rank writes a part of them.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = {
        f"model{i}": {
            name: _without_padding(chunk, name, entry)
            for name, entry in chunk.sharded_state_dict(metadata=sharding_metadata()).items()
            if not name.endswith("_extra_state")
        }
        for i, chunk in enumerate(chunks)
    }
    entries = [(part, name) for part, of_part in state.items() for name in of_part]
    sizes = [_bytes_saved(state[part][name]) for part, name in entries]
    for (part, name), writer in zip(entries, balanced_shares(sizes, group.size()), strict=True):
        state[part][name] = _with_writer(writer, state[part][name], group)
    return state


def _without_padding(chunk: GPTModel, name: str, entry: Any) -> Any:
    """The entry of a weight with one row per vocabulary entry, without padding rows."""
    shard = chunk.vocabulary_shard
    if not (shard.is_padded and name.endswith(VOCABULARY_WEIGHTS)):
        return entry
    return shard.stored(entry, entry.data)


def _bytes_saved(entry: ShardedBase) -> int:
    """Bytes to save, with the optimizer's state: master weight and both moments."""
    parameter: Any = entry.data
    state = 3 * 4 if parameter.requires_grad else 0
    return parameter.numel() * (parameter.itemsize + state)


def balanced_shares(sizes: list[int], count: int) -> list[int]:
    """Assign items of given sizes to ``count`` shares of about equal size; return each item's share."""
    shares, filled = [0] * len(sizes), [0] * count
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        shares[i] = min(range(count), key=filled.__getitem__)
        filled[shares[i]] += sizes[i]
    return shares


def _with_writer(writer: int, entry: Any, group: dist.ProcessGroup) -> Any:
    """The entry with the data-parallel part of its replica id shifted, so that it is 0 on the writer."""
    *others, rank = entry.replica_id
    assert rank == group.rank(), "the last part of a replica id is the data-parallel rank"
    replica = (*others, (rank - writer) % group.size())
    return dataclasses.replace(entry, replica_id=replica)


def writer_of(entry: Any) -> int | None:
    """The data-parallel rank that writes an entry of :func:`model_state`; ``None``: a rank of another group."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    *others, distance = entry.replica_id
    return None if any(others) else (group.rank() - distance) % group.size()


def set_model_state(chunks: list[GPTModel], loaded: dict[str, Any]) -> None:
    """Inverse of :func:`model_state`, from what Megatron loaded."""
    for i, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{i}"], strict=False)
        wrong = [name for name in missing if not name.endswith("_extra_state")] + unexpected
        if wrong:
            raise RuntimeError(f"model chunk {i} and its own state dict differ in {wrong[0]}")


def verified_checkpoint(path: str, fingerprint: str = "") -> Path:
    """Resolve a checkpoint and verify it on rank 0 for all ranks, before any file is opened.

    Args:
        path: the folder, or a run's ``checkpoints``.
        fingerprint: the expected :func:`~.provenance.checkpoint_fingerprint`; empty: do not check.

    Raises:
        HydraError: on every rank, if the checkpoint is missing, damaged or has another fingerprint.
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
        store.stored_tensors(folder)  # checks that the index is complete for its model
        return str(folder)

    return Path(on_main(check))


def load_model(chunks: list[GPTModel], folder: Path) -> None:
    """Fill a freshly built model from a verified checkpoint. Every stored tensor must be used.

    Raises:
        HydraError: no rank reads a tensor of the checkpoint.
    """
    state = model_state(chunks)
    _check_all_used(state, folder)
    set_model_state(chunks, load_state(state, folder))


def load_state(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load a sharded state dict from a verified checkpoint. Collective.

    Raises:
        HydraError: the error of the first rank that failed.
    """
    return load_sharded(state, folder / store.WEIGHTS, on_all)


def _check_all_used(state: dict[str, Any], folder: Path) -> None:
    asked = sorted({tensor.key for tensor in sharded_tensors(state)})
    everywhere: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, asked)
    used = {key for keys in everywhere for key in keys}
    stored = set(on_main(lambda: sorted(store.stored_tensors(folder))))
    for key in sorted(stored ^ used):
        where = "holds, but no rank reads" if key in stored else "lacks"
        raise HydraError(f"{folder}: the checkpoint {where} {key!r}")
