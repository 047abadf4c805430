"""The canonical state dict: the keys and shapes of a model, whatever the parallel layout.

A canonical state dict is a mapping from key to tensor. Every attention head is one slice along the
first axis of its tensor; which original heads those slices are follows from the
:class:`~megatron_hydra.config.model.ModelConfig`. It is what a Megatron checkpoint holds on disk
and what both converters speak.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.errors import HydraError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

FP32_SUFFIXES = ("self_attention.gdn.A_log", "self_attention.gdn.dt_bias")
"""Stored in fp32 whatever the model's dtype: decays near 1 do not survive bf16."""


def layer_prefix(layer: int) -> str:
    """Prefix of the keys of ``layer`` (0-based, counted over the whole model)."""
    return f"decoder.layers.{layer}."


def is_fp32(key: str) -> bool:
    """Whether ``key`` is stored in fp32 even in a bf16 model."""
    return key.endswith(FP32_SUFFIXES)


def fa_kv_groups(model: ModelConfig, layer: int) -> tuple[int, ...]:
    """KV groups κ(h) that at least one FA head of ``layer`` reads, ascending."""
    return tuple(sorted({model.kv_group(h) for h in model.fa_heads(layer)}))


def gdn_kv_sources(model: ModelConfig, layer: int) -> tuple[int, ...]:
    """For each GDN key-value head of ``layer``, the KV head of the dense model it comes from.

    ``mha``: one entry for each GDN head; ``gqa``: one for each KV group in use, ascending. With
    ``qkv=shared`` these are the heads after k and v were repeated, which the short convolution sees.
    """
    groups = [model.kv_group(h) for h in model.gdn_heads(layer)]
    return tuple(groups) if model.switches.gdn_kv == "mha" else tuple(sorted(set(groups)))


def _tied_shapes(model: ModelConfig) -> dict[str, Shape]:
    """What heads of both kinds read where k, v and norms are shared: of every KV group."""
    groups = model.num_kv_heads
    counts = {"k": groups, "v": groups}
    return _projections(model, "", counts) | _biases(model, "", counts) | _norms(model, "")


def _projections(model: ModelConfig, branch: str, counts: dict[str, int]) -> dict[str, Shape]:
    d, hidden = model.head_dim, model.hidden_size
    return {f"in.{branch}{part}": (count, d, hidden) for part, count in counts.items()}


def _biases(model: ModelConfig, branch: str, counts: dict[str, int]) -> dict[str, Shape]:
    if not model.qkv_bias:
        return {}
    return {f"in_bias.{branch}{part}": (count, model.head_dim) for part, count in counts.items()}


def _norms(model: ModelConfig, branch: str) -> dict[str, Shape]:
    d = model.head_dim
    return {f"{branch}q_norm": (d,), f"{branch}k_norm": (d,)} if model.qk_norm else {}


def _own_counts(model: ModelConfig, n: int, n_kv: int) -> dict[str, int]:
    """Heads of the projections that are a branch's own."""
    return {"q": n} if model.switches.ties_qkv else {"q": n, "k": n_kv, "v": n_kv}


def _fa_shapes(model: ModelConfig, layer: int) -> dict[str, Shape]:
    n, n_kv = len(model.fa_heads(layer)), len(fa_kv_groups(model, layer))
    if n == 0:
        return {}
    counts = _own_counts(model, n, n_kv)
    shapes = _projections(model, "fa.", counts)
    if model.switches.fa_gate:
        shapes["in.fa.gate"] = (n, model.head_dim, model.hidden_size)
    shapes |= _biases(model, "fa.", counts)
    if model.switches.fa_gate and model.switches.fa_gate_bias:
        shapes["in_bias.fa.gate"] = (n, model.head_dim)
    return shapes if model.switches.ties_qkv else shapes | _norms(model, "fa.")


def _gdn_shapes(model: ModelConfig, layer: int) -> dict[str, Shape]:
    n, n_kv = len(model.gdn_heads(layer)), len(gdn_kv_sources(model, layer))
    if n == 0:
        return {}
    d, hidden, switches = model.head_dim, model.hidden_size, model.switches
    own = _own_counts(model, n, n_kv)
    shapes = _projections(model, "gdn.", own)
    if switches.gdn_gate:
        shapes["in.gdn.gate"] = (n, d, hidden)
    shapes |= {"in.gdn.b": (n, hidden), "in.gdn.a": (n, hidden)}
    shapes |= _biases(model, "gdn.", own)
    if not switches.ties_qkv:
        shapes |= _norms(model, "gdn.")
    if switches.short_conv:
        counts = {"q": n, "k": n_kv, "v": n_kv}
        shapes |= {
            f"gdn.conv_{part}": (count, d, switches.conv_width) for part, count in counts.items()
        }
    return shapes | {"gdn.A_log": (n,), "gdn.dt_bias": (n,)}


def _fusion_shapes(model: ModelConfig) -> dict[str, Shape]:
    heads, hidden = model.num_query_heads, model.hidden_size
    shapes: dict[str, Shape] = {}
    if model.is_hybrid and model.switches.fusion in ("scale", "gated"):
        names = ("gamma.fa", "gamma.gdn") if model.switches.mixes_in_every_head else ("gamma",)
        shapes |= dict.fromkeys(names, (heads,))
    if model.is_hybrid and model.switches.fusion == "gated":
        shapes["fusion_gate"] = (heads, hidden)
    shapes["out"] = (heads, hidden, model.head_dim)
    if model.out_bias:
        shapes["out_bias"] = (hidden,)
    return shapes


def layer_shapes(model: ModelConfig, layer: int) -> dict[str, Shape]:
    """Keys and shapes of one layer, without its prefix."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    attention = _tied_shapes(model) if model.switches.ties_qkv else {}
    attention |= _fa_shapes(model, layer) | _gdn_shapes(model, layer) | _fusion_shapes(model)
    return {
        "input_layernorm.weight": (hidden,),
        **{f"self_attention.{name}": shape for name, shape in attention.items()},
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }


def canonical_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every canonical key of ``model`` with its global shape, in the order of the forward pass.

    A key whose first axis would be empty (no FA heads in a layer, say) is absent.
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
    """Account for every key of a canonical state dict.

    Args:
        found: key -> shape.
        model: what the keys should be for.
        source: where they come from, for the message.

    Raises:
        HydraError: naming the first missing, extra or misshapen key.
    """
    expected = canonical_shapes(model)
    refuse_differences(expected, {key: tuple(shape) for key, shape in found.items()}, source)


def refuse_differences(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], source: str | Callable[[str], str]
) -> None:
    """Raise unless two key -> shape mappings agree.

    Args:
        source: where ``found`` comes from, or a function that tells it for a key.

    Raises:
        HydraError: naming the key, the file, and how many more are wrong.
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
    """A tensor that is made when it is asked for: its shape, its dtype, and how to make it."""

    shape: Shape
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


class LazyTensors(Mapping[str, "torch.Tensor"]):
    """A state dict whose tensors are made on access and not kept.

    A conversion that goes through one of these holds one tensor at a time, not a whole model.
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
