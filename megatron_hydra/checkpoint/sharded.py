"""Convert Megatron's sharded state dicts to boxes of :mod:`megatron_hydra.checkpoint.records` and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import megatron_hydra.parallel.platform  # noqa: F401  # isort: skip  (before any megatron import)
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import apply_factory_merges, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from megatron_hydra.checkpoint.integrity import read_common, read_index
from megatron_hydra.checkpoint.records import Box, read_boxes


def sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    """All ShardedTensors in a nested state; factories are expanded."""
    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from sharded_tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from sharded_tensors(value)
    elif callable(getattr(state, "build", None)):
        yield from sharded_tensors(state.build())


def box_of(tensor: ShardedTensor) -> Box:
    """The box of a ShardedTensor: its part of the global tensor."""
    shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return Box(
        tensor.key, tuple(tensor.global_offset), shape, tuple(tensor.global_shape), tensor.dtype
    )


def main_replicas(state: Any) -> list[ShardedTensor]:
    """The tensors of a nested state that this rank saves: one rank saves each replicated tensor."""
    return [tensor for tensor in sharded_tensors(state) if is_main_replica(tensor.replica_id)]


def _data_to_load(state: Any, wanted: list[tuple[Box, torch.Tensor]]) -> Any:
    """Copy a nested state with empty tensors to fill, and append these to ``wanted``."""
    if isinstance(state, ShardedTensor):
        if state.data is None:
            state.init_data("cpu")
        assert state.data is not None
        box = box_of(state)
        wanted.append((box, state.data.detach().view(box.shape)))
        return state.data
    if isinstance(state, dict):
        return {key: _data_to_load(value, wanted) for key, value in state.items()}
    return [_data_to_load(value, wanted) for value in state]


def load_sharded(
    state: dict[str, Any],
    weights: Path,
    together: Callable[[Callable[[], Any]], Any] = lambda action: action(),
) -> dict[str, Any]:
    """Load a sharded state from the weights of a verified checkpoint.

    It replaces Megatron's ``dist_checkpointing.load``. It reads both pickles with a guard and every record
    once, and ranks do not wait for each other. It works the same for all releases of Megatron-Core, whose
    own reader interface changes often.

    Args:
        state: Megatron's sharded state dict.
        weights: the folder.
        together: runs a function so that an error on one rank raises on all; not needed in a single process.

    Returns:
        The state dict with tensors, and the checkpoint's other state (``common.pt``).

    Raises:
        HydraError: a tensor is missing or damaged or has a wrong shape.
    """
    state, not_stored, factories = load_preprocess(state)
    sharded, _ = extract_sharded_base(state)
    wanted: list[tuple[Box, torch.Tensor]] = []
    loaded = _data_to_load(sharded, wanted)
    result: dict[str, Any] = {}

    def read() -> None:  # an error on one rank raises on all ranks
        result.update(read_common(weights))
        read_boxes(weights, wanted, read_index(weights))

    together(read)
    merge(result, not_stored)
    merge(result, loaded)
    return apply_factory_merges(result, factories)
