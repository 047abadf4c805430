"""Initialise the student: a HydraHead made from the dense model's weights (design §5).

It works on canonical state dicts, so it does not depend on Hugging Face, Megatron or parallelism.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from megatron_hydra.checkpoint.canonical import (
    LazyTensor,
    LazyTensors,
    Shape,
    canonical_shapes,
    describe,
)
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.student import Init
from megatron_hydra.conversion.teacher_statistics import HeadStatistics
from megatron_hydra.errors import HydraError
from megatron_hydra.model.parameters import (
    INPUT,
    INPUT_BIAS,
    HeadParameter,
    entries,
    parameters_by_key,
)


@dataclasses.dataclass(frozen=True)
class StudentInit:
    """Initial values of parameters that the dense model does not have.

    The output gates start with W_g = 0: GDN heads' gates at 1, FA heads' gates at 2σ(1), a constant that the
    following norm removes (at 1 without bias or norm: ``hydra.fa_gate_bias``). β starts at 1/2 (W_b = 0), the
    convolution as the identity.

    Attributes:
        half_life_min, half_life_max: tokens after which an idle GDN head has forgotten half of its state. By
            default 32 … 16384; for measured half-lives 1 … 16384.
        kind: source of decay and β of a head. ``spread``: the half-lives of a layer's heads are spread evenly
            in the logarithm, in an order drawn from the seed, and β starts at 1/2 [choice: slow decays, because
            the teacher's heads forget nothing; training makes them faster if that helps]. ``statistics``: both
            come from the teacher's attention (:mod:`~megatron_hydra.conversion.teacher_statistics`), half-lives
            within the range. ``decay``: only the half-lives do.
    """

    half_life_min: float | None = None
    half_life_max: float = 16384.0
    kind: Init = dataclasses.field(default="spread", kw_only=True)

    @property
    def is_measured(self) -> bool:
        """Whether it needs statistics of the teacher's heads."""
        return self.kind != "spread"

    @property
    def half_life(self) -> tuple[float, float]:
        """The range of half-lives."""
        assert self.half_life_min is not None
        return self.half_life_min, self.half_life_max

    def __post_init__(self) -> None:
        if self.half_life_min is None:
            least = 1.0 if self.is_measured else 32.0
            object.__setattr__(self, "half_life_min", least)
        assert self.half_life_min is not None
        if not 0 < self.half_life_min <= self.half_life_max:
            raise HydraError(
                f"half-lives {self.half_life_min} … {self.half_life_max} must be positive and "
                "ascending"
            )


def half_lives(count: int, layer: int, seed: int, init: StudentInit) -> torch.Tensor:
    """``[count]`` fp64 half-lives in tokens for the GDN heads of a layer."""
    low, high = map(math.log, init.half_life)
    # A single head gets the middle of the range.
    steps = torch.linspace(0, 1, count, dtype=torch.float64) if count > 1 else torch.tensor([0.5])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    order = torch.randperm(count, generator=generator)
    return torch.exp(low + (high - low) * steps.double())[order]


def initial_dt_bias(half_life: torch.Tensor) -> torch.Tensor:
    """dt_bias for which a head with A_log = 0 and W_a = 0 has this half-life (fp32).

    log α = −softplus(dt_bias) = −ln 2 / half-life. dt_bias, not A_log, makes the decay slow. So W_a x can reach
    any decay, because softplus is an exponential there.
    """
    rate = math.log(2) / half_life.double()
    return torch.log(torch.expm1(rate)).float()


# -- the student ---------------------------------------------------------------------------------


def initialise_student(
    dense: Mapping[str, torch.Tensor],
    student: ModelConfig,
    gamma: torch.Tensor | None = None,
    seed: int = 0,
    init: StudentInit | None = None,
    statistics: HeadStatistics | None = None,
) -> LazyTensors:
    """Make the student's canonical state dict from the dense model's.

    Query heads, QK-norms, MLPs, norms, embeddings and the output projection are the dense model's.
    A GDN head has a copy of its KV group's k and v (``mha``) or shares it (``gqa``). With
    ``qkv=shared`` the layer keeps the dense model's k, v and QK-norms, one set for all its heads.

    Args:
        dense: canonical state dict of ``student.dense()``, lazy or not.
        student: the hybrid's config.
        gamma: ``[L, H]`` head scales from :func:`calibrate_gamma`; ``None`` for ones. Without a norm in the
            fusion, outputs keep their size, so γ is 1 for any ``gamma``. If every head is both FA and GDN, each
            of its two outputs gets half of it [choice: the mix starts as their mean]. A normalised ``concat``
            has no γ; it goes into the columns of the output projection [choice: every fusion then starts from
            the same function].
        seed: order of the decays over the heads of each layer.
        init: see :class:`StudentInit`.
        statistics: of the teacher's heads; needed if ``init.is_measured``.

    Returns:
        Lazy tensors: a read-only mapping; ``dict(...)`` computes all of them.

    Raises:
        HydraError: ``student`` is not a hybrid, ``gamma`` has the wrong shape, or statistics are missing.
    """
    if not student.is_hybrid:
        raise HydraError("the student's config is dense: apply a head map first")
    shape = (student.num_layers, student.num_query_heads)
    if gamma is None or student.switches.fusion_norm == "none":
        gamma = torch.ones(shape)
    if tuple(gamma.shape) != shape:
        raise HydraError(f"gamma has shape {list(gamma.shape)}, the model asks for {list(shape)}")
    if student.switches.mixes_in_every_head:
        gamma = gamma / 2
    init = init or StudentInit()
    if init.is_measured != (statistics is not None):
        raise HydraError(
            f"init={init.kind}, but statistics of the teacher's heads are "
            + ("missing" if statistics is None else "given")
        )
    context = _Context(dense, student, gamma, seed, init, statistics)
    return LazyTensors(
        {
            key: LazyTensor(key_shape, context.dtype(key), context.maker(key, key_shape))
            for key, key_shape in canonical_shapes(student).items()
        }
    )


_OUT = "self_attention.out"


def _source(row: HeadParameter) -> str:
    """The dense model's tensor from which a student's tensor is made: that of the FA heads."""
    parts = [part for part in row.key.split(".") if part not in ("fa", "gdn")]
    if row.branch or row.holder in (INPUT, INPUT_BIAS) or row.key.endswith("_norm"):
        parts.insert(len(parts) - 1, "fa")
    return ".".join(("self_attention", *parts))


@dataclasses.dataclass(frozen=True)
class _Context:
    dense: Mapping[str, torch.Tensor]
    student: ModelConfig
    gamma: torch.Tensor
    seed: int
    init: StudentInit
    statistics: HeadStatistics | None

    @functools.cached_property
    def rows(self) -> dict[str, HeadParameter]:
        """Rows of the attention's tensors, by name in a layer."""
        by_key = parameters_by_key(self.student)
        return {f"self_attention.{key}": row for key, row in by_key.items()}

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of the dense counterpart, or of the output projection without a counterpart."""
        prefix, _, name = _split(key)
        row = self.rows.get(name)
        if row is not None:
            if row.fp32:
                return torch.float32
            if row.start == "teacher" and row.axis:
                key = prefix + _source(row)
            elif key not in self.dense:
                key = prefix + _OUT
        return describe(self.dense, key).dtype

    def maker(self, key: str, shape: Shape) -> Callable[[], torch.Tensor]:
        return functools.partial(self._make, key, shape)

    def _make(self, key: str, shape: Shape) -> torch.Tensor:
        prefix, layer, name = _split(key)
        row = self.rows.get(name)
        if row is None:  # not a tensor of the attention
            return self.dense[key]
        dtype, start = self.dtype(key), row.start
        if start == "teacher":
            source = self.dense[prefix + _source(row)]
            if row.axis:
                return source[list(entries(self.student, layer, row.axis))]
            return source.to(dtype)
        if start == "output":
            if self.student.switches.fusion != "concat":
                return self.dense[key]
            return (self.dense[key].float() * self.gamma[layer, :, None, None]).to(dtype)
        if start == "gamma":
            return self.gamma[layer].to(dtype)
        if start == "identity":
            kernel = torch.zeros(shape, dtype=dtype)
            kernel[..., -1] = 1
            return kernel
        if start == "gate_bias":
            return torch.full(shape, self.student.switches.fa_gate_begins_at, dtype=dtype)
        if start == "decay":
            by_head = initial_dt_bias(self._half_lives(layer, shape[0]))
            return by_head.view(-1, *(1 for _ in shape[1:])).expand(shape).contiguous()
        if start == "write" and self.statistics is not None and self.init.kind == "statistics":
            heads = list(self.student.gdn_heads(layer))
            return self.statistics.write[layer, heads].to(dtype)
        return torch.zeros(shape, dtype=dtype)

    def _half_lives(self, layer: int, count: int) -> torch.Tensor:
        """Half-lives of a layer's GDN heads, in tokens."""
        if self.statistics is None:
            return half_lives(count, layer, self.seed, self.init)
        return self.statistics.half_life[layer, list(self.student.gdn_heads(layer))]


def _split(key: str) -> tuple[str, int, str]:
    """``decoder.layers.3.x.y`` -> (``decoder.layers.3.``, 3, ``x.y``); else (empty, -1, key)."""
    start = "decoder.layers."
    if not key.startswith(start):
        return "", -1, key
    number, _, name = key[len(start) :].partition(".")
    return f"{start}{number}.", int(number), name


# -- calibration ---------------------------------------------------------------------------------


@torch.no_grad()
def calibrate_gamma(hf_model: Any, token_batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Measure γ: the RMS of every head's output in the dense model, so that the fusion norm keeps its scale.

    Args:
        hf_model: a transformers model of any supported dense family, with or without LM head.
        token_batches: int64 ``[B, S]`` tensors without padding.

    Returns:
        ``[L, H]`` fp32: root mean square of ``o_proj``'s input over tokens and channels.

    Raises:
        HydraError: no tokens, or a model whose outputs are not finite.
    """
    backbone = getattr(hf_model, "model", hf_model)
    layers = backbone.layers
    heads = hf_model.config.num_attention_heads
    squares = torch.zeros(len(layers), heads, dtype=torch.float64)
    values = 0

    def hook(index: int, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        outputs = arguments[0].unflatten(-1, (heads, -1)).double()
        squares[index] += outputs.square().sum(dim=(0, 1, 3)).cpu()

    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(functools.partial(hook, index))
        for index, layer in enumerate(layers)
    ]
    try:
        for tokens in token_batches:
            backbone(input_ids=tokens.to(hf_model.device), use_cache=False)
            values += tokens.numel() * layers[0].self_attn.head_dim
    finally:
        for handle in handles:
            handle.remove()
    if values == 0:
        raise HydraError("calibration has no tokens")
    gamma = (squares / values).sqrt().float()
    if not gamma.isfinite().all():
        layer, head = (~gamma.isfinite()).nonzero()[0].tolist()
        raise HydraError(
            f"calibration: layer {layer}, head {head} gives values that are not finite"
        )
    return gamma
