"""Cut the part of one rank from the global packed stream."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.parallel import platform
from megatron_hydra.parallel.packed_sequence import PackedSequence
from megatron_hydra.parallel.world import World


@dataclasses.dataclass(frozen=True)
class LocalBatch:
    """This context-parallel rank's contiguous shard of a micro-batch.

    Attributes:
        tokens, labels: ``[T_local]`` int64 on the device.
        loss_mask: ``[T_local]`` float32 on the device.
        num_loss_tokens: unmasked tokens of the shard, a host integer (no device synchronisation).
        packed: document boundaries and positions.
        sample_ids: identity of the packed sequences of the whole micro-batch.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    num_loss_tokens: int
    packed: PackedSequence
    sample_ids: tuple[int, ...]


def pad_stream(batch: PackedBatch, length: int) -> PackedBatch:
    """Pad a stream to ``length`` tokens by one more document without loss."""
    missing = length - batch.tokens.numel()
    if missing == 0:
        return batch
    return PackedBatch(
        tokens=F.pad(batch.tokens, (0, missing)),
        labels=F.pad(batch.labels, (0, missing)),
        loss_mask=F.pad(batch.loss_mask, (0, missing)),
        cu_seqlens=(*batch.cu_seqlens, length),
        sample_ids=batch.sample_ids,
    )


def local_batch(batch: PackedBatch, world: World, stream_length: int) -> LocalBatch:
    """This rank's part of a micro-batch, padded to ``stream_length`` tokens (global), on the device.

    All ranks of a data-parallel replica pass the same batch.
    """
    batch = pad_stream(batch, stream_length)
    device = platform.device()
    length_local = stream_length // world.cp_size
    shard = slice(world.cp_rank * length_local, (world.cp_rank + 1) * length_local)
    mask = batch.loss_mask[shard]
    return LocalBatch(
        tokens=platform.to_device(batch.tokens[shard], device),
        labels=platform.to_device(batch.labels[shard], device),
        loss_mask=platform.to_device(mask, device),
        num_loss_tokens=int((mask != 0).sum()),
        packed=PackedSequence.from_batch(batch.cu_seqlens, world.cp_rank, world.cp_size, device),
        sample_ids=batch.sample_ids,
    )
