"""Between Megatron's sharded state dicts and the boxes of :mod:`megatron_hydra.checkpoint.records`."""

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
    """All ShardedTensors in nested state, factories expanded."""
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
    """What part of its global tensor a ShardedTensor is."""
    shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return Box(
        tensor.key, tuple(tensor.global_offset), shape, tuple(tensor.global_shape), tensor.dtype
    )


def main_replicas(state: Any) -> list[ShardedTensor]:
    """Of nested state what this rank stands for: of every replicated tensor one copy counts."""
    return [tensor for tensor in sharded_tensors(state) if is_main_replica(tensor.replica_id)]


def _data_to_load(state: Any, wanted: list[tuple[Box, torch.Tensor]]) -> Any:
    """Nested state with the tensors that are to be filled, which are noted in ``wanted``."""
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
    """Load what ranks ask for of a verified checkpoint's weights.

    As Megatron's ``dist_checkpointing.load``, but both pickles are read guarded, every record is read
    once, and ranks do not wait for each other. Nothing here differs between Megatron-Core's releases;
    their own ``load`` changes its readers' interface in every second one.

    Args:
        state: Megatron's sharded state dict.
        weights: the folder.
        together: how ranks agree on an error; not needed in a single process.

    Returns:
        The state dict with tensors, and what the checkpoint holds besides.

    Raises:
        HydraError: something is missing, misshapen or damaged.
    """
    state, not_stored, factories = load_preprocess(state)
    sharded, _ = extract_sharded_base(state)
    wanted: list[tuple[Box, torch.Tensor]] = []
    loaded = _data_to_load(sharded, wanted)
    result: dict[str, Any] = {}

    def read() -> None:  # an error of one rank is an error of all
        result.update(read_common(weights))
        read_boxes(weights, wanted, read_index(weights))

    together(read)
    merge(result, not_stored)
    merge(result, loaded)
    return apply_factory_merges(result, factories)
