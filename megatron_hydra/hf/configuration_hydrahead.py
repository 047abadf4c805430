"""Configuration of a HydraHead model in Hugging Face format (copied into every export).

HydraHead (arXiv 2606.20097): inside every attention layer a few query heads keep full attention
(FA), all others are Gated DeltaNet heads (GDN). This file needs transformers and nothing else.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

SWITCHES: dict[str, tuple[Any, tuple[Any, ...] | None]] = {
    "mixer": ("head", ("head", "token", "parallel")),
    "window": (512, None),
    "fusion": ("scale", ("scale", "gated", "concat")),
    "fusion_norm": ("rms", ("rms", "none")),
    "fa_position": ("log-scale", ("log-scale", "rope", "both", "none")),
    "fa_rotary_every": (0, None),
    "fa_gate": (True, (True, False)),
    "fa_gate_bias": (False, (True, False)),
    "linear": ("gdn", ("gdn", "kda")),
    "gdn_position": ("rope", ("rope", "none")),
    "qkv": ("decoupled", ("decoupled", "shared")),
    "gdn_kv": ("mha", ("mha", "gqa")),
    "gdn_gate": (True, (True, False)),
    "short_conv": (True, (True, False)),
    "conv_width": (4, tuple(range(1, 9))),
    "log_scale": ("train", ("train",)),
    "log_scale_a": (500.0, None),
    "granularity": ("query_head", ("query_head", "kv_group")),
}
"""Switch of the layer -> (default if a config does not name it, allowed values; ``None``: not a list).

Configs written before a switch existed do not name it. Their models do not have the feature.
"""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Types whose frequencies do not depend on the input's length, so that a cache stays valid."""


class HydraHeadConfig(PreTrainedConfig):
    """Architecture of a HydraHead decoder with a Qwen3, Qwen2 or Llama backbone.

    Args:
        family: ``qwen3``, ``qwen2`` or ``llama``, the family of the backbone (informative).
        head_dim: channels of a head; need not be hidden_size / num_attention_heads.
        rope_parameters: the dict of transformers 5. The older keys ``rope_theta`` and ``rope_scaling``
            are read as well.
        qk_norm: RMSNorm over the channels of q and k.
        attention_bias: biases on the q, k, v projections.
        out_bias: bias on the output projection.
        full_attention_heads: for each layer the sorted FA heads; default: every head. It must be every
            head if every head is both FA and GDN (``hydra.mixer`` other than ``head``).
        hydra: the layer's switches, see ``SWITCHES``, which has the defaults as well.
        gdn_kernel: ``auto`` uses the kernels of flash-linear-attention if they are installed and
            support the case (CUDA, 16-bit); ``torch`` never uses them.

    Raises:
        ValueError: a switch, a head or a rope type does not exist.
    """

    model_type = "hydrahead"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2048,
        intermediate_size: int = 6144,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        hidden_act: str = "silu",
        max_position_embeddings: int = 40960,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        rope_parameters: dict[str, Any] | None = None,
        family: str = "qwen3",
        qk_norm: bool = True,
        attention_bias: bool = False,
        out_bias: bool = False,
        full_attention_heads: list[list[int]] | None = None,
        hydra: dict[str, Any] | None = None,
        gdn_kernel: str = "auto",
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.rope_parameters: Any = dict(rope_parameters) if rope_parameters else None
        self.family = family
        self.qk_norm = qk_norm
        self.attention_bias = attention_bias
        self.out_bias = out_bias
        self.full_attention_heads = _heads(
            full_attention_heads, num_hidden_layers, num_attention_heads
        )
        self.hydra = _switches(hydra or {})
        if self.hydra["mixer"] != "head" and any(
            len(layer) < num_attention_heads for layer in self.full_attention_heads
        ):
            raise ValueError(
                f"hydra.mixer={self.hydra['mixer']} runs full attention in every head, but "
                "full_attention_heads does not list every head"
            )
        self.gdn_kernel = gdn_kernel
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self._check()

    def fa_rotates(self, layer: int) -> bool:
        """Whether full-attention heads of a layer (0-based) have a rotary embedding."""
        every = self.hydra["fa_rotary_every"]
        return self.hydra["fa_position"] in ("rope", "both") or (
            every > 0 and (layer + 1) % every == 0
        )

    def _check(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.gdn_kernel not in ("auto", "torch"):
            raise ValueError(f"gdn_kernel {self.gdn_kernel!r} must be 'auto' or 'torch'")
        kind = self.rope_parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_type {kind!r} is not supported: use one of {ROPE_TYPES}")
        if self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "partial_rotary_factor is not supported: rotary embedding covers all of head_dim"
            )


def _switches(given: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - set(SWITCHES))
    if unknown:
        raise ValueError(f"hydra.{unknown[0]} is unknown; the switches are {sorted(SWITCHES)}")
    values = {name: given.get(name, default) for name, (default, _) in SWITCHES.items()}
    for name, (_, allowed) in SWITCHES.items():
        if allowed is not None and values[name] not in allowed:
            raise ValueError(f"hydra.{name} is {values[name]!r}, it must be one of {allowed}")
    if values["log_scale_a"] <= 1:
        raise ValueError(f"hydra.log_scale_a is {values['log_scale_a']}, it must be above 1")
    if values["window"] < 1:
        raise ValueError(f"hydra.window is {values['window']}, it must be at least 1")
    if values["fa_rotary_every"] < 0:
        raise ValueError(
            f"hydra.fa_rotary_every is {values['fa_rotary_every']}, it must be at least 0"
        )
    return values


def _heads(given: list[list[int]] | None, num_layers: int, num_heads: int) -> list[list[int]]:
    if given is None:
        return [list(range(num_heads)) for _ in range(num_layers)]
    if len(given) != num_layers:
        raise ValueError(
            f"full_attention_heads has {len(given)} layers, num_hidden_layers is {num_layers}"
        )
    layers = [[int(head) for head in layer] for layer in given]
    for index, layer in enumerate(layers):
        if layer != sorted(set(layer)) or any(not 0 <= head < num_heads for head in layer):
            raise ValueError(
                f"full_attention_heads, layer {index}: {layer} must be sorted head indices below "
                f"{num_heads}, without repeats"
            )
    return layers


__all__ = ["HydraHeadConfig"]
