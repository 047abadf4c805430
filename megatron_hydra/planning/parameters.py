"""Memory that a rank always needs: weights, gradient buffer, optimizer states."""

from __future__ import annotations

import dataclasses
import math

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.model.local_heads import LocalHeads

BUFFER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128
"""With the distributed optimizer, Megatron-Core pads parameters and buckets to multiples of these."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a rank.

    Attributes:
        name: as in the model.
        numel: elements.
        wide: whether it is fp32 at any precision.
    """

    name: str
    numel: int
    wide: bool = False


def layer_parameters(model: ModelConfig, heads: LocalHeads, tp: int) -> list[Parameter]:
    """Parameters of one layer on a tensor-parallel rank, as in ``HydraAttention`` and its layer."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size // tp
    return [
        Parameter("input_layernorm", hidden),
        *(
            Parameter(f"self_attention.{p.name}", math.prod(p.shape), p.fp32)
            for p in heads.parameters
        ),
        Parameter("pre_mlp_layernorm", hidden),
        Parameter("mlp.linear_fc1", 2 * ffn * hidden),
        Parameter("mlp.linear_fc2", ffn * hidden),
    ]


def stage_parameters(
    model: ModelConfig, layers: list[LocalHeads], tp: int, first: bool, last: bool
) -> list[Parameter]:
    """Parameters of one pipeline stage: its layers, the embedding, the final norm and the head."""
    table = -(-model.vocab_size // tp) * model.hidden_size
    parameters = [Parameter("embedding", table)] if first else []
    for heads in layers:
        parameters += layer_parameters(model, heads, tp)
    if last:
        parameters.append(Parameter("final_layernorm", model.hidden_size))
        if not (model.tie_embeddings and first):
            parameters.append(Parameter("output_layer", table))
    return parameters


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes that stay between steps, and those of the optimizer's update.

    Attributes:
        parameters, gradients, optimizer: of the trained model.
        teacher: weights of the frozen teacher.
        update: temporaries of the optimizer's update.
        trained: number of trained elements.
    """

    parameters: int
    gradients: int
    optimizer: int
    teacher: int
    update: int
    trained: int


def held_bytes(
    parameters: list[Parameter],
    teacher: list[Parameter],
    *,
    size: int,
    trained: str,
    distributed: bool,
    shards: int,
    gpu: bool,
) -> Held:
    """Memory of Megatron-Core's DDP, distributed optimizer and AdamW for a rank's parameters.

    Args:
        size: bytes of a weight.
        trained: a part of the names of trained parameters; empty: all are trained.
        distributed: whether optimizer states are sharded.
        shards: number of ranks that share them: data times context parallel.
        gpu: whether it runs on a GPU, where torch's AdamW updates all parameters at once, not one by one.
    """
    weights = sum(p.numel * (4 if p.wide else size) for p in parameters)
    chosen = [p for p in parameters if trained in p.name]
    total = sum(p.numel for p in chosen)
    wide = sum(p.numel for p in chosen if p.wide or size == 4)
    padded = total
    if distributed:
        padded = sum(math.ceil(p.numel / BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT for p in chosen)
        weights += (padded - total) * size
    share = math.ceil(total / shards) if distributed else total
    # fp32 weights are their own main copies; bf16 weights get a copy.
    copies = 0 if size == 4 else (total - wide) * share // max(total, 1) * 4
    states = 2 * 4 * share
    largest = max((p.numel for p in chosen), default=0)
    update = 4 * (share if gpu else min(largest, share)) * (1 if gpu else 2)
    frozen = sum(p.numel * (4 if p.wide else size) for p in teacher)
    return Held(weights, 4 * padded, copies + states, frozen, update, total)
