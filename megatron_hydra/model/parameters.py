"""The parameters of a layer's attention, one row each (design §2). Everything about them derives from here.

A row decides the canonical key of checkpoints, the names in an export, the student's start value, shape and
padding on each tensor-parallel rank, the place of each head, which gradients are summed, weight decay, and the
planner's sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.ops.linear_rules import rule_of_model

Axis = Literal["fa", "fa_kv", "gdn", "gdn_kv", "kv", "head", ""]
"""Meaning of a tensor's first axis: FA heads; KV groups that FA heads read; GDN heads; key-value heads of GDN
(:func:`gdn_kv_sources`); all KV groups; all query heads. Empty: every rank has the whole tensor."""

Form = Literal["same", "heads", "columns", "channels"]
"""How a tensor is rearranged in an export, see :mod:`megatron_hydra.conversion.families`."""

Start = Literal["teacher", "zeros", "gate_bias", "identity", "decay", "write", "gamma", "output"]
"""How a tensor starts in a student, see :mod:`megatron_hydra.conversion.student`."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """Parameters of a rank with rows of several canonical tensors, or of several kinds of heads.

    Attributes:
        prefix: of the canonical keys of its tensors.
        own: the parameter with the rows that only this rank has, or with a tensor that every rank has.
        replicated: the parameter with the FA heads that every rank has (FA partition ``sequence``), or empty.
        shared: the parameter with the KV groups that several ranks read, or empty.
    """

    prefix: str
    own: str
    replicated: str = ""
    shared: str = ""


INPUT = Holder("in", "projections.in_proj.weight", "projections.fa_in", "projections.shared_kv")
INPUT_BIAS = Holder(
    "in_bias", "projections.in_bias", "projections.fa_in_bias", "projections.shared_kv_bias"
)
OUTPUT = Holder("out", "projections.out_proj.weight", "projections.fa_out")
OUTPUT_BIAS = Holder("out_bias", "projections.out_bias")
CONVOLUTION = Holder("gdn", "gdn.conv", shared="gdn.shared_conv")
GAMMA = Holder("gamma", "fusion.gamma", "fusion.fa_gamma")
COMPETITION = Holder("fusion_gate", "fusion.gate")
HOLDERS = (INPUT, OUTPUT, INPUT_BIAS, OUTPUT_BIAS, CONVOLUTION, GAMMA, COMPETITION)


@dataclasses.dataclass(frozen=True)
class HeadParameter:
    """One canonical tensor of a layer's attention.

    Attributes:
        key: canonical key below ``self_attention.``.
        axis: meaning of the first axis.
        tail: the other axes: ``d`` (head dimension), ``D`` (hidden size), ``H`` (query heads), ``W`` (width of
            the convolution).
        hf: name in an export below ``self_attn.``; the dense model's has no ``fa_`` in front.
        start: how it starts in a student.
        when: whether a model has it, in layers with heads of its branch.
        form: how it is rearranged in an export.
        holder: the parameters of a rank that contain it; ``None``: it is a separate parameter, named by its
            key.
        fp32: whether it is fp32 in a model of any dtype.
        decays: whether it has weight decay.
        like_norm: whether it acts once on every token, like a layer norm's weight, and so does its gradient.
            Any other parameter that all ranks have acts on each rank's heads, or its slice of the sequence.
    """

    key: str
    axis: Axis
    tail: tuple[str, ...]
    hf: str
    start: Start
    when: Callable[[ModelConfig], bool]
    form: Form = "same"
    holder: Holder | None = None
    fp32: bool = False
    decays: bool = True
    like_norm: bool = False

    @property
    def branch(self) -> str:
        """``fa`` or ``gdn`` if it belongs to heads of one kind; else empty."""
        return next((part for part in self.key.split(".") if part in ("fa", "gdn")), "")

    def shape(self, model: ModelConfig, entries: int) -> tuple[int, ...]:
        """The canonical shape with so many entries along the first axis."""
        tail = sizes(model, self.tail)
        return (entries, *tail) if self.axis else tail


def sizes(model: ModelConfig, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Lengths of axes, see :attr:`HeadParameter.tail`."""
    lengths = {
        "d": model.head_dim,
        "D": model.hidden_size,
        "H": model.num_query_heads,
        "W": model.switches.conv_width,
    }
    return tuple(lengths[axis] for axis in axes)


# -- conditions ----------------------------------------------------------------------------------


def _always(model: ModelConfig) -> bool:
    return True


def _tied(model: ModelConfig) -> bool:
    return model.switches.ties_qkv


def _apart(model: ModelConfig) -> bool:
    return not model.switches.ties_qkv


def _fa_gate(model: ModelConfig) -> bool:
    return model.switches.fa_gate


def _fa_gate_bias(model: ModelConfig) -> bool:
    return model.switches.fa_gate and model.switches.fa_gate_bias


def _head_decays(model: ModelConfig) -> bool:
    return not _channel_decays(model)


def _channel_decays(model: ModelConfig) -> bool:
    return rule_of_model(model.switches).decays_by_channel


def _gdn_gate(model: ModelConfig) -> bool:
    return model.switches.gdn_gate


def _convolved(model: ModelConfig) -> bool:
    return model.switches.short_conv


def _scaled(model: ModelConfig) -> bool:
    return model.is_hybrid and model.switches.fusion in ("scale", "gated")


def _one_scale(model: ModelConfig) -> bool:
    return _scaled(model) and not model.switches.mixes_in_every_head


def _two_scales(model: ModelConfig) -> bool:
    return _scaled(model) and model.switches.mixes_in_every_head


def _gated_fusion(model: ModelConfig) -> bool:
    return model.is_hybrid and model.switches.fusion == "gated"


def _out_bias(model: ModelConfig) -> bool:
    return model.out_bias


# -- the table -----------------------------------------------------------------------------------


def _projections(
    branch: str, parts: str, axis: Axis, when: Callable[[ModelConfig], bool]
) -> tuple[HeadParameter, ...]:
    """Weights of q, k or v projections."""
    return tuple(
        HeadParameter(
            f"in.{branch}{part}", axis, ("d", "D"), f"{branch.replace('.', '_')}{part}_proj.weight",
            "teacher", when, "heads", INPUT,
        )
        for part in parts
    )  # fmt: skip


def _biases(
    branch: str, parts: str, axis: Axis, when: Callable[[ModelConfig], bool]
) -> tuple[HeadParameter, ...]:
    """Their biases."""
    return tuple(
        HeadParameter(
            f"in_bias.{branch}{part}", axis, ("d",), f"{branch.replace('.', '_')}{part}_proj.bias",
            "teacher", lambda model: when(model) and model.qkv_bias, "heads", INPUT_BIAS, decays=False,
        )
        for part in parts
    )  # fmt: skip


def _norms(branch: str, when: Callable[[ModelConfig], bool]) -> tuple[HeadParameter, ...]:
    """QK-norms."""
    return tuple(
        HeadParameter(
            f"{branch}{part}_norm", "", ("d",), f"{branch.replace('.', '_')}{part}_norm.weight",
            "teacher", lambda model: when(model) and model.qk_norm, decays=False,
        )
        for part in "qk"
    )  # fmt: skip


def _kernels(parts: str, axis: Axis) -> tuple[HeadParameter, ...]:
    """Short convolutions."""
    return tuple(
        HeadParameter(
            f"gdn.conv_{part}", axis, ("d", "W"), f"gdn_{part}_conv.weight",
            "identity", _convolved, "channels", CONVOLUTION,
        )
        for part in parts
    )  # fmt: skip


# In the order of canonical keys, which is that of checkpoints and exports.
PARAMETERS: tuple[HeadParameter, ...] = (
    # k, v and norms that heads of both kinds read (hydra.qkv=shared)
    *_projections("", "kv", "kv", _tied),
    *_biases("", "kv", "kv", _tied),
    *_norms("", _tied),
    # FA heads
    *_projections("fa.", "q", "fa", _always),
    *_projections("fa.", "kv", "fa_kv", _apart),
    HeadParameter(
        "in.fa.gate", "fa", ("d", "D"), "fa_gate_proj.weight", "zeros", _fa_gate, "heads", INPUT
    ),
    *_biases("fa.", "q", "fa", _always),
    *_biases("fa.", "kv", "fa_kv", _apart),
    HeadParameter(
        "in_bias.fa.gate", "fa", ("d",), "fa_gate_proj.bias", "gate_bias", _fa_gate_bias, "heads", INPUT_BIAS,
        decays=False,
    ),
    *_norms("fa.", _apart),
    # GDN heads
    *_projections("gdn.", "q", "gdn", _always),
    *_projections("gdn.", "kv", "gdn_kv", _apart),
    HeadParameter(
        "in.gdn.gate", "gdn", ("d", "D"), "gdn_gate_proj.weight", "zeros", _gdn_gate, "heads", INPUT
    ),
    HeadParameter("in.gdn.b", "gdn", ("D",), "gdn_b_proj.weight", "write", _always, holder=INPUT),
    HeadParameter("in.gdn.a", "gdn", ("D",), "gdn_a_proj.weight", "zeros", _head_decays, holder=INPUT),
    HeadParameter(
        "in.gdn.a", "gdn", ("d", "D"), "gdn_a_proj.weight", "zeros", _channel_decays, "heads", INPUT
    ),
    *_biases("gdn.", "q", "gdn", _always),
    *_biases("gdn.", "kv", "gdn_kv", _apart),
    *_norms("gdn.", _apart),
    *_kernels("q", "gdn"),
    *_kernels("kv", "gdn_kv"),
    # bf16 cannot represent decays near 1.
    HeadParameter("gdn.A_log", "gdn", (), "gdn_A_log", "zeros", _always, fp32=True, decays=False),
    HeadParameter("gdn.dt_bias", "gdn", (), "gdn_dt_bias", "decay", _head_decays, fp32=True, decays=False),
    HeadParameter(
        "gdn.dt_bias", "gdn", ("d",), "gdn_dt_bias", "decay", _channel_decays, fp32=True, decays=False
    ),
    # fusion
    HeadParameter("gamma", "head", (), "gamma", "gamma", _one_scale, holder=GAMMA, decays=False),
    HeadParameter("gamma.fa", "head", (), "fa_gamma", "gamma", _two_scales, holder=GAMMA, decays=False),
    HeadParameter("gamma.gdn", "head", (), "gdn_gamma", "gamma", _two_scales, holder=GAMMA, decays=False),
    HeadParameter(
        "fusion_gate", "", ("H", "D"), "fusion_gate.weight", "zeros", _gated_fusion, holder=COMPETITION
    ),
    HeadParameter("out", "head", ("D", "d"), "o_proj.weight", "output", _always, "columns", OUTPUT),
    HeadParameter(
        "out_bias", "", ("D",), "o_proj.bias", "teacher", _out_bias, holder=OUTPUT_BIAS, decays=False,
        like_norm=True,
    ),
)  # fmt: skip


def parameters_of(model: ModelConfig, has_fa: bool, has_gdn: bool) -> tuple[HeadParameter, ...]:
    """Rows of a layer that has FA heads, GDN heads, or both."""
    branches = {"": True, "fa": has_fa, "gdn": has_gdn}
    return tuple(row for row in PARAMETERS if branches[row.branch] and row.when(model))


def parameters_by_key(model: ModelConfig) -> dict[str, HeadParameter]:
    """Rows of a model by canonical key. Rows of models that exclude each other may have one key."""
    rows = parameters_of(model, has_fa=True, has_gdn=True)
    found = {row.key: row for row in rows}
    assert len(found) == len(rows), "two rows of one model have the same key"
    return found


def parameters_of_layer(model: ModelConfig, layer: int) -> tuple[HeadParameter, ...]:
    """Rows of ``layer`` (0-based)."""
    return parameters_of(model, bool(model.fa_heads(layer)), bool(model.gdn_heads(layer)))


# -- meaning of the first axis --------------------------------------------------------------------


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


def entries(model: ModelConfig, layer: int, axis: Axis) -> tuple[int, ...]:
    """The heads or KV heads of the dense model from which the entries of a first axis come."""
    if axis == "fa":
        return model.fa_heads(layer)
    if axis == "gdn":
        return model.gdn_heads(layer)
    if axis == "fa_kv":
        return fa_kv_groups(model, layer)
    if axis == "gdn_kv":
        return gdn_kv_sources(model, layer)
    return tuple(range(model.num_kv_heads if axis == "kv" else model.num_query_heads))
