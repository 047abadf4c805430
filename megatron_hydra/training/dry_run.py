"""Describe the layout of a run without starting it: no process group, no weights.

Every line is a YAML comment, so the output of ``--dry-run`` is a valid config file.
"""

from __future__ import annotations

from megatron_hydra.checkpoint import store
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.config.validate import (
    accumulation_steps,
    check_layout,
    data_parallel_size,
    rounded_stream_length,
)
from megatron_hydra.environment import world_size_from_environment
from megatron_hydra.errors import HydraError
from megatron_hydra.model.local_heads import LocalHeads
from megatron_hydra.model.parameters import INPUT, OUTPUT
from megatron_hydra.parallel.head_partition import LayerPartition, plan_model


def describe_layout(config: RunConfig, world_size: int | None = None) -> str:
    """Sizes of groups, batches and every rank's shapes, as text.

    Args:
        config: the run.
        world_size: number of processes; ``None``: the number in this launch.

    Raises:
        HydraError: the layout cannot work for this world, batch or model.
    """
    world_size = world_size or world_size_from_environment()
    lines = [*_batch_lines(config, world_size), ""]
    try:
        model = store.read_model_config(config.student.checkpoint)
    except HydraError as error:
        return "\n".join([*lines, *_commented(f"shapes need the model: {error}")])
    teacher = None
    if config.teacher.checkpoint:
        teacher = store.read_model_config(config.teacher.checkpoint)
    check_layout(config, world_size, model, teacher)
    lines += _model_lines(config, model)
    return "\n".join(lines)


def _commented(text: str) -> list[str]:
    return [f"# {line}" for line in text.splitlines()]


def _batch_lines(config: RunConfig, world_size: int) -> list[str]:
    parallel, batch = config.parallel, config.batch
    replicas = data_parallel_size(config, world_size)
    steps = accumulation_steps(config, world_size)
    stream = rounded_stream_length(config)
    shard = stream // parallel.context
    tokens_per_step = batch.global_batch_size * config.data.sequence_length
    return [
        f"# {world_size} processes = tensor {parallel.tensor} · context {parallel.context} · "
        f"pipeline {parallel.pipeline} · data {replicas}",
        f"# step: {batch.global_batch_size} sequences of {config.data.sequence_length:,} = "
        f"{tokens_per_step:,} tokens; run: {config.schedule.steps * tokens_per_step:,} tokens",
        f"# data-parallel rank: {steps} micro-batches of {batch.micro_batch_size} sequences = one "
        f"stream of {stream:,} tokens",
        f"# context-parallel shard: {shard:,} tokens; activations [{_rows(config, shard):,}, 1, D]",
    ]


def _rows(config: RunConfig, shard: int) -> int:
    return shard // config.parallel.tensor if config.parallel.sequence else shard


def _model_lines(config: RunConfig, model: ModelConfig) -> list[str]:
    parallel = config.parallel
    tp = parallel.tensor
    d, hidden = model.head_dim, model.hidden_size
    partitions = plan_model(model, tp, parallel.fa_partition)
    lines = [
        f"# model: {model.num_layers} layers, D {hidden}, {model.num_query_heads} query heads, "
        f"{model.num_kv_heads} KV heads of {d}, vocabulary {model.vocab_size:,}",
        f"# each tensor-parallel rank: embedding [{-(-model.vocab_size // tp):,}, {hidden}], "
        f"mlp.linear_fc1 [{2 * model.ffn_hidden_size // tp}, {hidden}], "
        f"mlp.linear_fc2 [{hidden}, {model.ffn_hidden_size // tp}]",
    ]
    stages = parallel.pipeline * parallel.virtual_pipeline
    per_stage = model.num_layers // stages
    shard = rounded_stream_length(config) // parallel.context
    for stage in range(parallel.pipeline):
        for chunk in range(parallel.virtual_pipeline):
            first = (chunk * parallel.pipeline + stage) * per_stage
            lines.append(f"# pipeline rank {stage}, layers {first}–{first + per_stage - 1}:")
            for partition in partitions[first : first + per_stage]:
                lines += _layer_lines(model, partition, shard)
    return lines


def _layer_lines(model: ModelConfig, partition: LayerPartition, shard: int) -> list[str]:
    imbalance = partition.full_attention_imbalance()
    lines = [f"#   layer {partition.layer} (FA imbalance {imbalance:.2f})"]
    for rank in range(partition.tp_size):
        heads = LocalHeads(model, partition, rank)
        fa, gdn = partition.fa[rank], partition.gdn[rank]
        outputs = [f"[{shard:,}, {len(heads.sharded) * model.head_dim}]"]
        if heads.replicated_fa:
            columns = len(heads.replicated_fa) * model.head_dim
            outputs.append(f"FA on a slice [{shard // partition.tp_size:,}, {columns}]")
        lines += [
            f"#     tensor rank {rank}: FA {_heads(fa)}, GDN {_heads(gdn)}, "
            f"head outputs {' and '.join(outputs)}",
            f"#       {', '.join(_weights(heads))}",
        ]
    return lines


def _weights(heads: LocalHeads) -> list[str]:
    """The rank's fused projections and their shapes, with padding; projections of its own heads come first."""
    linears = [p for p in heads.parameters if p.key in (INPUT.prefix, OUTPUT.prefix)]
    return [
        f"{linear.name.split('.')[1]} {list(linear.shape)}"
        for linear in sorted(linears, key=lambda linear: not linear.sharded)
    ]


def _heads(heads: tuple[int, ...]) -> str:
    return ",".join(map(str, heads)) if heads else "none"
