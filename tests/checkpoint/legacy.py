"""Checkpoints as versions before 2026-11-28 wrote them: one record for each head, by torch's own writer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as dcp

from megatron_hydra.checkpoint import store
from tests.training import tiny


def _pieces(key: str, tensor: torch.Tensor) -> int:
    """Number of a tensor's records in older versions, which wrote fused weights head by head."""
    if tensor.dim() < 1 or not tensor.shape[0]:
        return 1
    if ".self_attention." in key and not key.endswith(("_norm", "out_bias")):
        return tensor.shape[0]
    return 2 if tensor.shape[0] % 2 == 0 and tensor.dim() > 1 else 1


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The files of records and their index."""
    state = {}
    for key, tensor in tensors.items():
        count = _pieces(key, tensor)
        for i, piece in enumerate(tensor.chunk(count) if count > 1 else [tensor]):
            offsets = [(0, i, count)] if count > 1 else []
            state[f"{key}#{i}"] = ShardedTensor.from_rank_offsets(key, piece.contiguous(), *offsets)
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(state, True)
    owned = not dist.is_initialized()
    if owned:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dcp.save(
            mcore_to_pyt_state_dict(flat, False),
            storage_writer=dcp.FileSystemWriter(folder),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
    finally:
        if owned:
            dist.destroy_process_group()


def rewrite(folder: Path) -> int:
    """Replace a checkpoint's files by those of an older version; returns their number of records."""
    weights = folder / store.WEIGHTS
    tensors = tiny.everything(folder)
    old = folder / "old"
    old.mkdir()
    write_weights(old, tensors)
    for name in ("common.pt", "metadata.json"):
        shutil.copy(weights / name, old / name)
    shutil.rmtree(weights)
    old.rename(weights)
    provenance = store.read_manifest(folder)["provenance"]
    store.write_manifest(folder, provenance)
    return len(store.read_index(weights).storage_data)
