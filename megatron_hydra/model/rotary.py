"""Rotary position embedding from explicit positions, so that packing and sharding cannot shift positions.

Megatron-Core's packed rotary infers offsets from tensor lengths, and its context-parallel rotary assumes zigzag
shards. We pass every token's own position instead.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.parallel.packed_sequence import PackedSequence

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Types whose frequencies do not depend on the length of the current input."""


def inverse_frequencies(
    rope_parameters: dict[str, Any], head_dim: int, max_position_embeddings: int
) -> tuple[torch.Tensor, float]:
    """Frequencies of rotary embedding; transformers computes them for every type except the default.

    Args:
        rope_parameters: transformers 5's dict (``rope_type``, ``rope_theta``, …).
        head_dim: d; rotary covers all of it.
        max_position_embeddings: the native context length, which some types read.

    Returns:
        ``[d/2]`` fp32 inverse frequencies, and the factor by which cos and sin are multiplied.

    Raises:
        HydraError: a rope type whose frequencies change with the input's length.
    """
    kind = rope_parameters.get("rope_type", "default")
    if kind not in SUPPORTED_ROPE_TYPES:
        raise HydraError(
            f"rope_type {kind!r} is not supported (supported: {', '.join(SUPPORTED_ROPE_TYPES)})"
        )
    if kind == "default":
        theta = float(rope_parameters["rope_theta"])
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / theta**exponent, 1.0

    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # The functions read a few attributes; a config class of one family would add others.
    config = SimpleNamespace(
        rope_parameters=rope_parameters,
        head_dim=head_dim,
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_position_embeddings,
        standardize_rope_params=lambda: None,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return frequencies.float(), float(factor)


class Rotary:
    """A model's rotary embedding; tables are computed once per stream and shared by all layers.

    Args:
        rope_parameters, head_dim, max_position_embeddings: see :func:`inverse_frequencies`.
    """

    def __init__(
        self, rope_parameters: dict[str, Any], head_dim: int, max_position_embeddings: int
    ) -> None:
        self.frequencies, self.factor = inverse_frequencies(
            rope_parameters, head_dim, max_position_embeddings
        )
        # Teacher and student may run on one stream; the key identifies the table's owner.
        self._key = json.dumps([rope_parameters, head_dim, max_position_embeddings], sort_keys=True)

    def tables(
        self, positions: torch.Tensor, packed: PackedSequence
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin ``[T, 1, d]`` of tokens at ``positions [T]`` in their documents."""
        tables: tuple[torch.Tensor, torch.Tensor] = packed.cached(
            ("rotary", self._key, positions.data_ptr(), len(positions)),
            lambda: rotary_tables(positions, self.frequencies, self.factor),
        )
        return tables


def rotary_tables(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin for given positions.

    Args:
        positions: ``[T]`` int64, each token's position in its document.
        frequencies: ``[d/2]`` fp32.
        factor: attention factor of the rope type.

    Returns:
        Two fp32 tensors ``[T, 1, d]``, the halves repeated (Hugging Face's rotate-half convention).
    """
    frequencies = frequencies.to(positions.device, non_blocking=True)
    angles = positions.float()[:, None] * frequencies[None, :]
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos() * factor, angles.sin() * factor
