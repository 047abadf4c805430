"""Name maps as data: which Hugging Face tensors make each canonical tensor, for every family.

A row of a table has: canonical key, form, Hugging Face names. Rows of the attention come from
:data:`~megatron_hydra.model.parameters.PARAMETERS`.
:func:`~megatron_hydra.checkpoint.canonical.canonical_shapes` decides which rows a model uses. A canonical key
without a row, or a Hugging Face tensor without a row, is an error in :mod:`.hf_io`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_hydra.checkpoint.canonical import Shape, canonical_shapes
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.model.parameters import parameters_by_key

if TYPE_CHECKING:
    import torch

# -- how a tensor is rearranged ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of the relation between Hugging Face tensors and a canonical tensor; exact in both directions.

    Attributes:
        to_canonical: (HF tensors, canonical shape) -> canonical tensor.
        to_hf: canonical tensor -> HF tensors, contiguous.
        hf_shapes: canonical shape -> HF shapes.
    """

    to_canonical: Callable[[Sequence[torch.Tensor], Shape], torch.Tensor]
    to_hf: Callable[[torch.Tensor], list[torch.Tensor]]
    hf_shapes: Callable[[Shape], list[Shape]]


def _concatenate(parts: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
    import torch

    return torch.cat(list(parts), dim=0)


SAME = Form(
    to_canonical=lambda parts, shape: parts[0],
    to_hf=lambda tensor: [tensor.contiguous()],
    hf_shapes=lambda shape: [shape],
)
"""The tensor is unchanged."""

HEADS = Form(
    to_canonical=lambda parts, shape: parts[0].reshape(shape),
    to_hf=lambda tensor: [tensor.reshape(-1, *tensor.shape[2:]).contiguous()],
    hf_shapes=lambda shape: [(shape[0] * shape[1], *shape[2:])],
)
"""``[n·d, …]`` <-> ``[n, d, …]``: rows, head after head."""

HEAD_COLUMNS = Form(
    to_canonical=lambda parts, shape: (
        parts[0].reshape(shape[1], shape[0], shape[2]).transpose(0, 1).contiguous()
    ),
    to_hf=lambda tensor: [tensor.transpose(0, 1).reshape(tensor.shape[1], -1).contiguous()],
    hf_shapes=lambda shape: [(shape[1], shape[0] * shape[2])],
)
"""``[D, H·d]`` <-> ``[H, D, d]``: columns, head after head (the output projection)."""

GATE_AND_UP = Form(
    to_canonical=_concatenate,
    to_hf=lambda tensor: [part.contiguous() for part in tensor.chunk(2, dim=0)],
    hf_shapes=lambda shape: [(shape[0] // 2, *shape[1:])] * 2,
)
"""``[F, D]``, ``[F, D]`` <-> ``[2F, D]``: gate rows, then up rows."""

CHANNELS = Form(
    to_canonical=lambda parts, shape: parts[0].reshape(shape),
    to_hf=lambda tensor: [tensor.reshape(-1, 1, tensor.shape[2]).contiguous()],
    hf_shapes=lambda shape: [(shape[0] * shape[1], 1, shape[2])],
)
"""``[n·d, 1, W]`` <-> ``[n, d, W]``: the kernels of a depthwise convolution."""


# -- the tables ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a name map."""

    canonical: str
    form: Form
    hf: tuple[str, ...]


def _rows(*rows: tuple[str, Form, str]) -> tuple[Row, ...]:
    return tuple(Row(canonical, form, tuple(names.split())) for canonical, form, names in rows)


GLOBAL = _rows(
    ("embedding.word_embeddings.weight", SAME, "model.embed_tokens.weight"),
    ("decoder.final_layernorm.weight", SAME, "model.norm.weight"),
    ("output_layer.weight", SAME, "lm_head.weight"),
)

BLOCK = _rows(
    ("input_layernorm.weight", SAME, "input_layernorm.weight"),
    ("pre_mlp_layernorm.weight", SAME, "post_attention_layernorm.weight"),
    ("mlp.linear_fc1.weight", GATE_AND_UP, "mlp.gate_proj.weight mlp.up_proj.weight"),
    ("mlp.linear_fc2.weight", SAME, "mlp.down_proj.weight"),
)

FORMS = {"same": SAME, "heads": HEADS, "columns": HEAD_COLUMNS, "channels": CHANNELS}


@dataclasses.dataclass(frozen=True)
class Family:
    """What distinguishes a dense family.

    Attributes:
        architecture: class name in ``config.json``.
        qk_norm: QK-norm on q and k.
        qkv_bias: biases on q, k, v: ``True``, ``False``, or ``None``: the config's ``attention_bias``.
        out_bias: bias on the output projection, likewise.
    """

    architecture: str
    qk_norm: bool
    qkv_bias: bool | None
    out_bias: bool | None


FAMILIES = {
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        qk_norm=True,
        qkv_bias=None,
        out_bias=None,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        qk_norm=False,
        qkv_bias=True,
        out_bias=False,
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        qk_norm=False,
        qkv_bias=None,
        out_bias=None,
    ),
}

HARMLESS_EXTRAS = (
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"model\.rotary_emb\.inv_freq",
)
"""HF tensors of old exports that follow from the config. These, and no others, are skipped."""


# -- the map of one model ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mapping:
    """The relation between one canonical tensor of a model and Hugging Face tensors.

    Attributes:
        canonical, canonical_shape: its key and shape.
        form: the rearrangement.
        hf: names and shapes of the HF tensors.
    """

    canonical: str
    canonical_shape: Shape
    form: Form
    hf: dict[str, Shape]


def _split_layer(key: str) -> tuple[str, str]:
    """``decoder.layers.3.x.y`` -> (``3``, ``x.y``); a global key -> (````, key)."""
    prefix = "decoder.layers."
    if not key.startswith(prefix):
        return "", key
    layer, _, name = key[len(prefix) :].partition(".")
    return layer, name


def _attention_rows(model: ModelConfig) -> list[Row]:
    """The name map of the attention, from the table of its parameters."""
    rows = parameters_by_key(model)
    if not model.is_hybrid:
        family = FAMILIES[model.family]
        without = [] if family.qk_norm else ["fa.q_norm", "fa.k_norm"]
        without += ["out_bias"] if family.out_bias is False else []
        rows = {key: row for key, row in rows.items() if key not in without}
    return [
        Row(
            f"self_attention.{key}",
            FORMS[row.form],
            (f"self_attn.{row.hf if model.is_hybrid else row.hf.removeprefix('fa_')}",),
        )
        for key, row in rows.items()
    ]


def name_map(model: ModelConfig) -> list[Mapping]:
    """Every canonical tensor of ``model`` with its Hugging Face counterparts.

    Raises:
        HydraError: the family's table has no name for a tensor of this model.
    """
    rows = {row.canonical: row for row in (*GLOBAL, *BLOCK, *_attention_rows(model))}
    mappings = []
    for key, shape in canonical_shapes(model).items():
        layer, name = _split_layer(key)
        row = rows.get(name)
        if row is None:
            raise HydraError(f"family {model.family!r} has no Hugging Face name for {key!r}")
        prefix = f"model.layers.{layer}." if layer else ""
        hf = dict(zip((prefix + n for n in row.hf), row.form.hf_shapes(shape), strict=True))
        mappings.append(Mapping(key, shape, row.form, hf))
    return mappings
