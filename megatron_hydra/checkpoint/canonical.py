"""The canonical state dict: the keys and shapes of a model, independent of the parallel layout.

A canonical state dict is a mapping from key to tensor. Every attention head is one slice along the
first axis of its tensor. The :class:`~megatron_hydra.config.model.ModelConfig` says which original head
each slice belongs to. Megatron checkpoints store this state dict, and both converters read and write it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.model.parameters import PARAMETERS, entries, parameters_of_layer

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

_FP32 = tuple(f"self_attention.{row.key}" for row in PARAMETERS if row.fp32)


def layer_prefix(layer: int) -> str:
    """Prefix of the keys of ``layer`` (0-based, counted over the whole model)."""
    return f"decoder.layers.{layer}."


def is_fp32(key: str) -> bool:
    """Whether ``key`` is stored in fp32 even in a bf16 model."""
    return key.endswith(_FP32)


def layer_shapes(model: ModelConfig, layer: int) -> dict[str, Shape]:
    """Keys and shapes of one layer, without its prefix."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    attention = {
        row.key: row.shape(model, len(entries(model, layer, row.axis)))
        for row in parameters_of_layer(model, layer)
    }
    return {
        "input_layernorm.weight": (hidden,),
        **{f"self_attention.{name}": shape for name, shape in attention.items()},
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }


def canonical_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every canonical key of ``model`` with its global shape, in the order of the forward pass.

    A key whose first axis would be empty is absent (for example if a layer has no FA heads).
    """
    shapes: dict[str, Shape] = {
        "embedding.word_embeddings.weight": (model.vocab_size, model.hidden_size)
    }
    for layer in range(model.num_layers):
        prefix = layer_prefix(layer)
        shapes |= {prefix + name: shape for name, shape in layer_shapes(model, layer).items()}
    shapes["decoder.final_layernorm.weight"] = (model.hidden_size,)
    if not model.tie_embeddings:
        shapes["output_layer.weight"] = (model.vocab_size, model.hidden_size)
    return shapes


def check_shapes(found: Mapping[str, Sequence[int]], model: ModelConfig, source: str) -> None:
    """Check every key and shape of a canonical state dict.

    Args:
        found: key -> shape.
        model: the config that the keys must match.
        source: the origin of the keys, for the error message.

    Raises:
        HydraError: a key is missing or extra, or has a wrong shape; names the first one.
    """
    expected = canonical_shapes(model)
    refuse_differences(expected, {key: tuple(shape) for key, shape in found.items()}, source)


def refuse_differences(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], source: str | Callable[[str], str]
) -> None:
    """Raise unless two key -> shape mappings agree.

    Args:
        source: the origin of ``found``, or a function from key to origin.

    Raises:
        HydraError: names the key, the file, and the number of other wrong keys.
    """
    where = source if callable(source) else lambda key: source
    missing = [key for key in expected if key not in found]
    extra = sorted(key for key in found if key not in expected)
    wrong = [key for key in expected if key in found and expected[key] != found[key]]
    problems = [f"{where(key)}: key {key!r} is missing" for key in missing]
    problems += [f"{where(key)}: key {key!r} is not part of this model" for key in extra]
    problems += [
        f"{where(key)}: key {key!r} has shape {list(found[key])}, the config asks for "
        f"{list(expected[key])}"
        for key in wrong
    ]
    if problems:
        more = f" (and {len(problems) - 1} more keys)" if len(problems) > 1 else ""
        raise HydraError(problems[0] + more)


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made on access: its shape, its dtype, and the function that makes it."""

    shape: Shape
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


class LazyTensors(Mapping[str, "torch.Tensor"]):
    """A state dict whose tensors are made on access and not kept.

    With it, a conversion holds one tensor at a time in memory instead of a whole model.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._tensors[key].make()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def describe(self, key: str) -> LazyTensor:
        """Shape and dtype of ``key``, without making the tensor."""
        return self._tensors[key]


def describe(tensors: Mapping[str, torch.Tensor], key: str) -> LazyTensor:
    """Shape and dtype of one entry of a state dict, lazy or not; a lazy tensor is not made."""
    if isinstance(tensors, LazyTensors):
        return tensors.describe(key)
    tensor = tensors[key]
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
