"""Config of a model, stored as ``model.json`` in every checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import HeadMap, ModelIdentity


@dataclasses.dataclass(frozen=True)
class HydraConfig:
    """Options of a HydraHead layer (design §2); each is a row of the paper's ablations.

    Attributes:
        mixer: how full attention and Gated DeltaNet are combined. ``head``: a head runs one of them, as
            the head map says (HydraHead; the layer-wise hybrid; all GDN). The baselines run both in
            every head, normalise and scale each output, and add them. ``parallel``: both read the
            whole context. ``token``: softmax reads the last ``window`` tokens, the linear state reads
            all earlier tokens.
        window: for ``mixer=token``, tokens in the softmax of a query, itself included.
        fusion: how head outputs are combined. ``scale``: a learned scalar γ per head. ``gated``: learned,
            input-dependent weights that compete between heads, or between the two outputs of each
            head if ``mixer`` is not ``head``. ``concat``: unchanged.
        fusion_norm: ``rms`` normalises every head's output over its channels in fp32; ``none``.
        fa_position: position information of FA heads: ``log-scale`` (no rotary, queries scaled by
            ln(t+a)/ln(a)), ``rope``, ``both``, or ``none``.
        fa_rotary_every: FA heads of every such layer (n: the n-th, 2n-th, …) have a rotary embedding besides
            what ``fa_position`` gives them; 0: no layer.
        fa_gate: the per-channel output gate 2σ(W_g x + b_g) of FA heads.
        fa_gate_bias: whether this gate has a bias, which starts at 1 (as in the paper). Without it the gate
            is 2σ(W_g x), which starts at exactly 1.
        linear: the recurrence of heads without full attention. ``gdn``: the gated delta rule, with a decay
            of each head. ``kda``: Kimi Delta Attention, with a decay of each channel of a head's keys. The
            other options of GDN heads apply to both.
        gdn_position: position information of GDN heads: ``rope``, or ``none``.
        qkv: ``decoupled``: FA and GDN heads have separate W_K, W_V and QK-norms (the paper's query
            decomposition). ``shared``: FA and GDN heads of one KV group share W_K and W_V, and all
            heads of a layer share the QK-norms. Every head always has its own W_Q.
        gdn_kv: ``mha``: every GDN head has its own k and v; ``gqa``: heads of a KV group share them.
            With ``qkv=shared`` the group shares the projections in both cases: ``mha`` repeats k and v
            for every head before the short convolution, which then has separate kernels per head.
        gdn_gate: the per-channel output gate of GDN heads.
        short_conv: causal depthwise convolution on q, k, v of GDN heads.
        conv_width: width of the short convolution in tokens.
        log_scale: when the log scale of ``fa_position`` is applied. ``train``: always. ``final``: not in
            training, only in exports and evaluations, as in HALO (:meth:`ModelConfig.finished`).
        log_scale_a: a of the log scale; t is counted from the start of the document.
        granularity: the unit of the FA/GDN assignment, ``query_head`` or ``kv_group``. With
            ``kv_group`` a head map of single query heads is rejected. A map of whole groups fits both;
            the model then has the granularity of the map.
    """

    mixer: Literal["head", "token", "parallel"] = "head"
    window: int = 512
    fusion: Literal["scale", "gated", "concat"] = "scale"
    fusion_norm: Literal["rms", "none"] = "rms"
    fa_position: Literal["log-scale", "rope", "both", "none"] = "log-scale"
    fa_rotary_every: int = 0
    fa_gate: bool = True
    fa_gate_bias: bool = True
    linear: Literal["gdn", "kda"] = "gdn"
    gdn_position: Literal["rope", "none"] = "rope"
    qkv: Literal["decoupled", "shared"] = "decoupled"
    gdn_kv: Literal["mha", "gqa"] = "mha"
    gdn_gate: bool = True
    short_conv: bool = True
    conv_width: int = 4
    log_scale: Literal["train", "final"] = "train"
    log_scale_a: float = 500.0
    granularity: Literal["query_head", "kv_group"] = "query_head"

    def __post_init__(self) -> None:
        if not 1 <= self.conv_width <= 8:
            raise HydraError(f"hydra.conv_width is {self.conv_width}: it must be 1..8")
        if self.log_scale_a <= 1:
            raise HydraError(f"hydra.log_scale_a is {self.log_scale_a}: it must be above 1")
        if self.window < 1:
            raise HydraError(f"hydra.window is {self.window}: it must be at least 1")
        if self.fa_rotary_every < 0:
            raise HydraError(
                f"hydra.fa_rotary_every is {self.fa_rotary_every}: it must be at least 0"
            )

    def fa_rotates(self, layer: int) -> bool:
        """Whether FA heads of a layer (0-based) have a rotary embedding."""
        every = self.fa_rotary_every
        return self.fa_position in ("rope", "both") or (every > 0 and (layer + 1) % every == 0)

    @property
    def mixes_in_every_head(self) -> bool:
        """Whether every head runs both full attention and Gated DeltaNet, without a head map."""
        return self.mixer != "head"

    @property
    def scales_queries(self) -> bool:
        """Whether FA queries are multiplied by the log scale now."""
        return self.fa_position in ("log-scale", "both") and self.log_scale == "train"

    @property
    def fa_gate_begins_at(self) -> float:
        """Initial value of the gate's bias: 1, or 0 (gate 1) if no norm removes a constant factor."""
        return 1.0 if self.fusion_norm == "rms" else 0.0

    @property
    def ties_qkv(self) -> bool:
        """Whether FA and GDN heads read the same k and v projections and QK-norms."""
        return self.qkv == "shared"

    @property
    def fa_window(self) -> int | None:
        """Number of tokens that a softmax query sees; ``None``: all tokens before it."""
        return self.window if self.mixer == "token" else None


_SIZES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "num_query_heads", "num_kv_heads", "head_dim",
    "max_position_embeddings",
)  # fmt: skip

BEFORE_THE_SWITCH = {"fa_gate_bias": False}
"""Values of options that older stored models lack, if they differ from today's defaults."""


def stored_switches(body: Mapping[str, Any]) -> dict[str, Any]:
    """Layer options of a stored model. An option newer than the file gets the value that the model has."""
    return {**BEFORE_THE_SWITCH, **body}


DENSE_ATTENTION = HydraConfig(
    fusion="concat",
    fusion_norm="none",
    fa_position="rope",
    fa_gate=False,
    fa_gate_bias=False,
    gdn_gate=False,
    short_conv=False,
)
"""If every head is FA, a layer with these switches is the teacher's attention (design §2)."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's architecture, dense or hybrid.

    Attributes:
        family: ``qwen3``, ``qwen2`` or ``llama``: decides the Hugging Face names.
        num_layers, hidden_size, ffn_hidden_size, vocab_size: as usual (L, D, F, V).
        num_query_heads, num_kv_heads, head_dim: H, G, d; d need not be D/H.
        norm_eps: epsilon of every RMSNorm.
        rope_parameters: the dict of transformers 5: ``rope_type``, ``rope_theta`` and the type's parameters.
        max_position_embeddings: the native context length (informative; inputs are not truncated to it).
        tie_embeddings: the LM head is the embedding.
        qk_norm: RMSNorm over d on q and k (Qwen3).
        qkv_bias: biases on the q, k, v projections (Qwen2).
        out_bias: bias on the output projection (Llama with ``attention_bias``).
        hydra: the switches of a hybrid; ``None`` for the dense model.
        full_attention_heads: for each layer the sorted FA heads; ``None`` for the dense model. All heads
            if every head mixes both (``hydra.mixer``).
        head_map: the whole head map as JSON (provenance), or ``None``.
        source: origin of the weights: name, revision, fingerprint.
        hf_config: the original ``config.json``, so that an export can restore the keys that we do not read.
    """

    family: Literal["qwen3", "qwen2", "llama"]
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    vocab_size: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    max_position_embeddings: int = 32768
    tie_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    hydra: HydraConfig | None = None
    full_attention_heads: tuple[tuple[int, ...], ...] | None = None
    head_map: dict[str, Any] | None = None
    source: dict[str, str] = dataclasses.field(default_factory=dict)
    hf_config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in _SIZES:
            size = getattr(self, key)
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**31:
                raise HydraError(f"{key} is {size!r}: it must be a whole number from 1 to 2^31 - 1")
        if self.num_query_heads % self.num_kv_heads:
            raise HydraError(
                f"num_query_heads {self.num_query_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}"
            )
        if (self.hydra is None) != (self.full_attention_heads is None):
            raise HydraError("give both hydra and full_attention_heads, or neither")
        if self.full_attention_heads is not None:
            heads = tuple(tuple(int(h) for h in layer) for layer in self.full_attention_heads)
            object.__setattr__(self, "full_attention_heads", heads)
            if len(heads) != self.num_layers:
                raise HydraError(
                    f"full_attention_heads has {len(heads)} layers, the model {self.num_layers}"
                )
            for layer, chosen in enumerate(heads):
                if list(chosen) != sorted(set(chosen)) or any(
                    not 0 <= h < self.num_query_heads for h in chosen
                ):
                    raise HydraError(
                        f"full_attention_heads, layer {layer}: {list(chosen)} must be sorted head "
                        f"indices below {self.num_query_heads}, without repeats"
                    )

        if self.switches.mixes_in_every_head and any(
            len(self.fa_heads(layer)) < self.num_query_heads for layer in range(self.num_layers)
        ):
            raise HydraError(
                f"hydra.mixer={self.switches.mixer} runs full attention in every head, "
                "but full_attention_heads does not list every head: leave the head map out"
            )

    @property
    def is_hybrid(self) -> bool:
        """Whether this is a HydraHead model (or one of its baselines) and not the dense teacher."""
        return self.hydra is not None

    @property
    def switches(self) -> HydraConfig:
        """Layer options; for a dense model, the options that give the teacher's attention."""
        return self.hydra or DENSE_ATTENTION

    @property
    def has_rotary_fa(self) -> bool:
        """Whether FA heads of any layer have a rotary embedding."""
        return any(self.switches.fa_rotates(layer) for layer in range(self.num_layers))

    def fa_heads(self, layer: int) -> tuple[int, ...]:
        """Original indices of the FA heads of ``layer`` (0-based); all of them in a dense model."""
        if self.full_attention_heads is None:
            return tuple(range(self.num_query_heads))
        return self.full_attention_heads[layer]

    def gdn_heads(self, layer: int) -> tuple[int, ...]:
        """Original indices of the GDN heads of ``layer``, ascending."""
        if self.switches.mixes_in_every_head:
            return tuple(range(self.num_query_heads))
        chosen = set(self.fa_heads(layer))
        return tuple(h for h in range(self.num_query_heads) if h not in chosen)

    def kv_group(self, head: int) -> int:
        """κ(h): the KV head that query head ``head`` of the dense model reads."""
        return head // (self.num_query_heads // self.num_kv_heads)

    def check_fa_partition(self, partition: str) -> None:
        """Check that a partition of FA heads over tensor-parallel ranks supports this model.

        Raises:
            HydraError: it does not; names the key to change.
        """
        if partition == "sequence" and self.switches.mixes_in_every_head:
            raise HydraError(
                f"parallel.fa_partition=sequence cannot lay out hydra.mixer={self.switches.mixer}: "
                "full attention and GDN share each head's output projection, so both must be on the "
                "head's rank; set parallel.fa_partition=heads"
            )

    def identity(self) -> ModelIdentity:
        """Identity of the dense model; a head map must have the same."""
        return ModelIdentity(
            name=self.source.get("name", ""),
            revision=self.source.get("revision", ""),
            family=self.family,
            num_layers=self.num_layers,
            num_query_heads=self.num_query_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
            fingerprint=self.source.get("fingerprint", ""),
        )

    def dense(self) -> ModelConfig:
        """The dense model of the same shape."""
        return dataclasses.replace(self, hydra=None, full_attention_heads=None, head_map=None)

    def finished(self) -> ModelConfig:
        """This model after training: a log scale that is off during training (``final``) is on.

        Weights are the same. An export holds the finished model. If it is converted back, the log scale
        stays on.
        """
        if self.hydra is None or self.hydra.log_scale == "train":
            return self
        return dataclasses.replace(self, hydra=dataclasses.replace(self.hydra, log_scale="train"))

    def with_head_map(self, head_map: HeadMap, hydra: HydraConfig) -> ModelConfig:
        """The hybrid that ``head_map`` makes of this dense model.

        Raises:
            HydraError: the map is for another model, or has single heads although ``hydra.granularity``
                is ``kv_group``.
        """
        head_map.check_model(self.identity())
        if hydra.mixes_in_every_head:
            raise HydraError(
                f"hydra.mixer={hydra.mixer} runs full attention and GDN in every head: leave the head "
                "map out"
            )
        if hydra.granularity == "kv_group" and head_map.granularity != "kv_group":
            raise HydraError(
                "hydra.granularity is kv_group, the head map assigns single query heads; make the "
                "map with --granularity kv_group"
            )
        return dataclasses.replace(
            self,
            hydra=dataclasses.replace(hydra, granularity=head_map.granularity),  # type: ignore[arg-type]
            full_attention_heads=head_map.full_attention_heads,
            head_map=head_map.to_dict(),
        )

    def with_every_head_mixed(self, hydra: HydraConfig) -> ModelConfig:
        """The token-wise or head-wise mixing baseline that ``hydra`` makes of this dense model.

        Raises:
            HydraError: ``hydra.mixer`` is ``head``, which needs a head map.
        """
        if not hydra.mixes_in_every_head:
            raise HydraError(
                "a head map is missing: hydra.mixer=head needs one, which lists the heads that keep full "
                "attention"
            )
        every = (tuple(range(self.num_query_heads)),) * self.num_layers
        return dataclasses.replace(self, hydra=hydra, full_attention_heads=every)
