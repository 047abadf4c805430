"""Validate the keys of a config together when it is read, before a run starts.

:func:`check_run` needs only the config. :func:`check_layout` also needs the world size and the shapes of
the models. Every message names the key to change.
"""

from __future__ import annotations

import math
import os
import re

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig, SourceConfig
from megatron_hydra.errors import HydraError

VERBS_WITH_TEACHER = ("align", "distill")
RECOMPUTE_MODULES = ("attention", "fa", "gdn", "tail", "mlp")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise HydraError(message)


def check_run(config: RunConfig) -> None:
    """Check that keys do not contradict each other.

    Raises:
        HydraError: naming the key.
    """
    _check_inputs(config)
    _check_numbers(config)
    _check_validation(config)
    _check_switches(config)


def check_seeds(config: RunConfig) -> None:
    """Check that seeds are in the range of the generators.

    Raises:
        HydraError: naming the key.
    """
    for key, seed in (("seed", config.seed), ("data.seed", config.data.seed)):
        _require(0 <= seed < 2**32, f"{key} is {seed}: it must be between 0 and 2^32 - 1")


def _check_inputs(config: RunConfig) -> None:
    verb = config.verb
    _require(bool(config.output), "output is empty: name the folder that this run writes")
    _require(
        bool(config.student.checkpoint),
        f"student.checkpoint is empty: {verb} starts from a checkpoint made by "
        "tools/hf_to_megatron.py or by an earlier stage",
    )
    for key in ("student", "teacher"):
        fingerprint = getattr(config, key).fingerprint
        _require(
            not fingerprint or re.fullmatch("sha256:[0-9a-f]{64}", fingerprint) is not None,
            f"{key}.fingerprint is {fingerprint!r}: write sha256: and 64 hexadecimal digits",
        )
    needs_teacher = verb in VERBS_WITH_TEACHER
    _require(
        bool(config.teacher.checkpoint) == needs_teacher,
        f"teacher.checkpoint is empty: {verb} needs the dense model's checkpoint"
        if needs_teacher
        else f"teacher.checkpoint is set, but {verb} has no teacher: remove it",
    )
    _require(bool(config.data.blend), "data.blend is empty: name at least one source")
    _check_blend("data.blend", config.data.blend)


def _check_blend(name: str, blend: tuple[SourceConfig, ...]) -> None:
    for i, source in enumerate(blend):
        key = f"{name}.{i}"
        _require(source.weight > 0, f"{key}.weight is {source.weight}: it must be above 0")
        if source.kind == "indexed":
            _require(bool(source.path), f"{key}.path is empty: an indexed source needs one")
        else:
            _require(bool(source.task), f"{key}.task is empty: a synthetic source needs one")


def _check_numbers(config: RunConfig) -> None:
    at_least_one = {
        "batch": ("micro_batch_size", "global_batch_size"),
        "data": ("sequence_length",),
        "schedule": ("steps",),
        "loss": ("chunk_tokens",),
        "parallel": ("tensor", "context", "pipeline", "virtual_pipeline"),
        "recompute": ("num_layers",),
        "checkpoint": ("interval",),
        "logging": ("interval",),
        "faults": ("timeout_seconds", "spike_window"),
    }
    for section, keys in at_least_one.items():
        for key in keys:
            value = getattr(getattr(config, section), key)
            _require(value >= 1, f"{section}.{key} is {value}: it must be at least 1")
    check_seeds(config)
    optimizer, schedule, loss = config.optimizer, config.schedule, config.loss
    _require(optimizer.lr > 0, f"optimizer.lr is {optimizer.lr}: it must be above 0")
    _require(
        0 <= optimizer.min_lr <= optimizer.lr,
        f"optimizer.min_lr is {optimizer.min_lr}: it must be between 0 and optimizer.lr "
        f"({optimizer.lr})",
    )
    for key in ("weight_decay", "clip_grad"):
        value = getattr(optimizer, key)
        _require(value >= 0, f"optimizer.{key} is {value}: it must not be negative")
    for key in ("beta1", "beta2"):
        value = getattr(optimizer, key)
        _require(0 <= value < 1, f"optimizer.{key} is {value}: it must be at least 0 and below 1")
    _require(optimizer.eps > 0, f"optimizer.eps is {optimizer.eps}: it must be above 0")
    _require(
        0 <= schedule.warmup_steps < schedule.steps,
        f"schedule.warmup_steps is {schedule.warmup_steps}: it must be below schedule.steps "
        f"({schedule.steps})",
    )
    _require(0 <= loss.kl_weight <= 1, f"loss.kl_weight is {loss.kl_weight}: it must be in 0..1")
    _require(loss.temperature > 0, f"loss.temperature is {loss.temperature}: it must be above 0")
    for section, key in (
        ("checkpoint", "keep"),
        ("faults", "max_skipped_steps"),
        ("faults", "stop_seconds_before_limit"),
        ("logging", "gamma_interval"),
        ("logging", "peak_tflops"),
    ):
        value = getattr(getattr(config, section), key)
        _require(value >= 0, f"{section}.{key} is {value}: it must not be negative")
    factor = config.faults.spike_factor
    _require(
        factor == 0 or factor > 1,
        f"faults.spike_factor is {factor}: it must be above 1, or 0 for no check",
    )


def _check_validation(config: RunConfig) -> None:
    validation, schedule, data = config.validation, config.schedule, config.data
    for section, key in (("validation", "interval"), ("schedule", "patience")):
        value = getattr(getattr(config, section), key)
        _require(value >= 0, f"{section}.{key} is {value}: it must not be negative")
    for key in ("sequences", "probe_sequences"):
        value = getattr(validation, key)
        _require(value >= 1, f"validation.{key} is {value}: it must be at least 1")
    _require(
        0 <= data.held_out < 1,
        f"data.held_out is {data.held_out}: it is a share, at least 0 and below 1",
    )
    _require(data.phase >= 1, f"data.phase is {data.phase}: it counts from 1")
    least = schedule.min_improvement
    _require(
        0 <= least < math.inf,
        f"schedule.min_improvement is {least}: it must be a number that is not negative",
    )
    _require(
        not schedule.patience or validation.interval > 0,
        f"schedule.patience is {schedule.patience}, but validation.interval is 0: set validation.interval, "
        "because patience needs validations",
    )
    _require(
        not validation.interval or bool(validation.blend) or data.held_out > 0,
        f"validation.interval is {validation.interval}, but nothing is held out: set data.held_out (for "
        "example 0.001) or name sources in validation.blend",
    )
    _require(
        not (validation.blend and data.held_out),
        f"validation.blend names sources and data.held_out is {data.held_out}: validation reads only one of "
        "the two, remove the other",
    )
    _check_blend("validation.blend", validation.blend)
    _check_blend("validation.probes", validation.probes)
    for i, source in enumerate(validation.probes):
        _require(
            source.kind == "synthetic",
            f"validation.probes.{i}.kind is {source.kind}: a probe is a generated task (kind: synthetic)",
        )
    _require(
        not validation.probes or config.verb != "align",
        "validation.probes: align does not run the whole student, which must answer; remove them, or set "
        "them in distill and finetune",
    )
    _require(
        not validation.probes or validation.interval > 0,
        "validation.probes are named, but validation.interval is 0: set it, or remove them",
    )
    trained = {os.path.realpath(s.path): i for i, s in enumerate(data.blend) if s.kind == "indexed"}
    for i, source in enumerate(validation.blend):
        place = trained.get(os.path.realpath(source.path)) if source.kind == "indexed" else None
        _require(
            place is None,
            f"validation.blend.{i}.path is {source.path}, which training reads (data.blend.{place}): "
            "name other data, or set data.held_out",
        )


def _check_switches(config: RunConfig) -> None:
    parallel, recompute = config.parallel, config.recompute
    _require(
        not parallel.sequence or parallel.tensor > 1,
        "parallel.sequence is true, but parallel.tensor is 1: sequence parallelism shards over the "
        "tensor-parallel group",
    )
    _require(
        parallel.virtual_pipeline == 1 or parallel.pipeline > 1,
        f"parallel.virtual_pipeline is {parallel.virtual_pipeline}, but parallel.pipeline is 1",
    )
    _require(
        config.precision == "fp32" or parallel.distributed_optimizer,
        f"precision={config.precision} needs parallel.distributed_optimizer=true, on one rank as well: "
        "Megatron-Core's plain optimizer cannot save a model that keeps A_log and dt_bias in fp32",
    )
    _require(
        not parallel.overlap_param_gather or parallel.distributed_optimizer,
        "parallel.overlap_param_gather needs parallel.distributed_optimizer=true",
    )
    _require(
        not parallel.overlap_param_gather or parallel.overlap_grad_reduce,
        "parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true",
    )
    _require(
        config.verb != "align" or not parallel.overlap_grad_reduce,
        "parallel.overlap_grad_reduce cannot be used by align: align computes gradients inside the forward, "
        "so no backward can overlap with communication",
    )
    if recompute.granularity == "selective":
        unknown = [m for m in recompute.modules if m not in RECOMPUTE_MODULES]
        _require(
            not unknown,
            f"recompute.modules: {unknown[:1]} is unknown; known: {', '.join(RECOMPUTE_MODULES)}",
        )
        inside = [m for m in recompute.modules if m in ("fa", "gdn", "tail")]
        _require(
            not inside or "attention" not in recompute.modules,
            f"recompute.modules names attention and {inside[:1]}: attention includes fa, gdn and tail, "
            "remove one",
        )
    by_sequence = parallel.fa_partition == "sequence" and parallel.tensor > 1
    _require(
        config.backend.streams != "two" or (parallel.context == 1 and not by_sequence),
        "backend.streams=two is not possible if full attention communicates (parallel.context or, with "
        "parallel.fa_partition=sequence, parallel.tensor above 1): set it to auto",
    )


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Data-parallel size: the world size divided by the model-parallel size.

    Raises:
        HydraError: the world size is not a multiple of the model-parallel size.
    """
    parallel = config.parallel
    model_size = parallel.tensor * parallel.context * parallel.pipeline
    sizes = f"{parallel.tensor}·{parallel.context}·{parallel.pipeline}"
    _require(
        model_size <= world_size,
        f"parallel.tensor · context · pipeline = {sizes} = {model_size} processes, one a GPU, but this run "
        f"has {world_size}: start {model_size} (torchrun --nproc-per-node, launch/*.sh --gpus-per-node "
        "and --nodes) or make these keys smaller",
    )
    _require(
        world_size % model_size == 0,
        f"parallel.tensor · context · pipeline = {sizes} = {model_size} does not divide the "
        f"{world_size} processes of this run",
    )
    return world_size // model_size


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches that each data-parallel rank runs per step.

    Raises:
        HydraError: the batch size cannot be divided evenly.
    """
    replicas = data_parallel_size(config, world_size)
    per_round = config.batch.micro_batch_size * replicas
    _require(
        config.batch.global_batch_size % per_round == 0,
        f"batch.global_batch_size {config.batch.global_batch_size} is not a multiple of "
        f"batch.micro_batch_size · data-parallel size = {config.batch.micro_batch_size}·{replicas}",
    )
    return config.batch.global_batch_size // per_round


def check_layout(
    config: RunConfig, world_size: int, student: ModelConfig, teacher: ModelConfig | None = None
) -> None:
    """Check the layout against world size, batch size and model shapes.

    Raises:
        HydraError: naming the key or the layer.
    """
    micro_batches = accumulation_steps(config, world_size)
    parallel = config.parallel
    stages = parallel.pipeline * parallel.virtual_pipeline
    for model, name in ((student, "student"), (teacher, "teacher")):
        if model is None:
            continue
        _require(
            model.num_layers % stages == 0,
            f"parallel.pipeline · parallel.virtual_pipeline = {stages} does not divide the "
            f"{name}'s {model.num_layers} layers",
        )
        _require(
            model.num_query_heads >= parallel.tensor,
            f"parallel.tensor is {parallel.tensor}, but the {name} has {model.num_query_heads} "
            "query heads a layer",
        )
        if parallel.tensor > 1:
            model.check_fa_partition(parallel.fa_partition)
        _check_convolution(config, model, name)
        _require(
            model.ffn_hidden_size % parallel.tensor == 0,
            f"parallel.tensor {parallel.tensor} does not divide the {name}'s ffn_hidden_size "
            f"{model.ffn_hidden_size}",
        )
        rows = -(-model.vocab_size // parallel.tensor)
        _require(
            rows * (parallel.tensor - 1) < model.vocab_size,
            f"parallel.tensor is {parallel.tensor}: with {rows} entries of the {name}'s vocabulary of "
            f"{model.vocab_size} per rank, the last rank has none",
        )
    _require(
        config.backend.streams != "two" or not student.has_rotary_fa,
        "backend.streams=two is not possible with hydra.fa_position="
        f"{student.switches.fa_position}, hydra.fa_rotary_every={student.switches.fa_rotary_every}: "
        "both branches share rotary tables; set it to auto",
    )
    _require(
        parallel.virtual_pipeline == 1 or micro_batches % parallel.pipeline == 0,
        f"the interleaved schedule needs a multiple of parallel.pipeline ({parallel.pipeline}) as number "
        f"of micro-batches per step, this run has {micro_batches}: change batch.global_batch_size",
    )
    if teacher is not None:
        check_teacher(student, teacher)


def _check_convolution(config: RunConfig, model: ModelConfig, name: str) -> None:
    """Check that every context-parallel shard is at least as long as the halo of the next shard."""
    context, switches = config.parallel.context, model.switches
    halo = switches.conv_width - 1 if model.is_hybrid and switches.short_conv else 0
    shard = rounded_stream_length(config) // context
    _require(
        context == 1 or shard >= halo,
        f"parallel.context is {context}: its shards of {shard} tokens are shorter than the {halo} earlier "
        f"tokens that the {name}'s short convolution reads (hydra.conv_width); use a smaller value, or a "
        "longer data.sequence_length",
    )


def check_teacher(student: ModelConfig, teacher: ModelConfig) -> None:
    """Check that the teacher is dense, has the student's shape, and is the student's original model.

    Raises:
        HydraError: names the first difference.
    """
    _require(
        not teacher.is_hybrid, "teacher.checkpoint holds a hybrid: the teacher is the dense model"
    )
    for field in (
        "family",
        "num_layers",
        "hidden_size",
        "vocab_size",
        "num_query_heads",
        "head_dim",
    ):
        mine, theirs = getattr(student, field), getattr(teacher, field)
        _require(
            mine == theirs,
            f"teacher.checkpoint: its {field} is {theirs}, the student's is {mine}",
        )
    mine, theirs = student.source.get("fingerprint", ""), teacher.source.get("fingerprint", "")
    _require(
        not (mine and theirs) or mine == theirs,
        f"teacher.checkpoint is not the model that the student was made from: its weights have "
        f"fingerprint {theirs[:19]}…, the student's origin {mine[:19]}…",
    )


def rounded_stream_length(config: RunConfig) -> int:
    """Tokens of a micro-batch after padding to a length that the layout can shard evenly.

    Each context-parallel rank has two mirrored half shards. Tensor-parallel ranks cut each shard again under
    sequence parallelism, and for work that they do not divide by heads: full attention by slices of the
    sequence, KV groups shared between ranks, gated fusion.
    """
    parallel = config.parallel
    multiple = parallel.context * parallel.tensor
    if parallel.context > 1:
        multiple *= 2
    length = config.batch.micro_batch_size * config.data.sequence_length
    return -(-length // multiple) * multiple
