"""What a run does: one YAML file per run, one section per concern.

Units: tokens, steps, bytes or seconds as each key says. ``loading.load_run_config`` builds it from
YAML plus ``section.key=value`` overrides and refuses unknown keys by name. In paths, ``~`` and
``$VARIABLE`` are expanded.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_hydra.paths import PathText

Verb = Literal["pretrain", "align", "distill", "finetune"]


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The model being trained. ``checkpoint`` is a Megatron checkpoint made by ``tools/hf_to_megatron.py``
    or by an earlier stage; training never starts from random weights because a path was wrong.
    ``fingerprint`` (``sha256:`` and the hash of its manifest.json), if given, is what it must have.
    """

    checkpoint: PathText = ""
    fingerprint: str = ""


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """The frozen dense model of ``align`` and ``distill``: a Megatron checkpoint.

    ``fingerprint`` as in :class:`StudentConfig`.
    """

    checkpoint: PathText = ""
    fingerprint: str = ""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One part of a blend.

    Attributes:
        kind: ``indexed`` (Megatron ``.bin/.idx``) or ``synthetic`` (generated on the fly).
        path: prefix of the ``.bin/.idx`` pair, for ``indexed``.
        task: generator name, for ``synthetic``.
        options: the generator's keyword arguments.
        weight: share of the *tokens* drawn from this part, relative to the others.
        upsample: for ``indexed``, smallest document length in tokens → how often such a document
            appears in an epoch, e.g. ``{0: 0.5, 32768: 2, 131072: 4}``; 0 drops the bucket. A
            document belongs to the largest key that is not above its length; below all keys: once.
        max_epochs: refuse a run that would read this part more often; 0: no limit (but logged).
    """

    kind: Literal["indexed", "synthetic"] = "indexed"
    path: PathText = ""
    task: str = ""
    options: dict = dataclasses.field(default_factory=dict)
    weight: float = 1.0
    upsample: dict = dataclasses.field(default_factory=dict)
    max_epochs: float = 0.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read.

    Attributes:
        blend: the parts and their weights.
        sequence_length: tokens of one packed sequence.
        tokenizer: path or Hub name of an HF tokenizer (needed by ``synthetic`` sources).
        packing: ``best_fit`` | ``split_long`` | ``concat_chunk``.
        seed: seed of shuffling and of generators.
        cache_dir: where packing indices are kept; empty: in ``.packs`` beside the data.
        token_budget: most tokens (padding included) that this stage may read; 0: no limit. A run
            whose steps need more is refused before it starts.
        held_out: share of the documents of every ``indexed`` part that training never reads, for
            ``validation``. Which ones depends on their numbers in the file alone, so that stages of
            one share hold out the same documents.
        phase: raise it by one to change ``blend`` or ``batch.global_batch_size`` when a run is resumed:
            every source that stays goes on where it is, and the optimizer is kept. Without it such a
            change is refused.
    """

    blend: tuple[SourceConfig, ...] = ()
    sequence_length: int = 4096
    tokenizer: PathText = ""
    packing: Literal["best_fit", "split_long", "concat_chunk"] = "best_fit"
    seed: int = 1234
    cache_dir: PathText = ""
    token_budget: int = 0
    held_out: float = 0.0
    phase: int = 1


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Sizes in packed sequences. A micro-batch of m sequences is one packed stream of m·S tokens.

    global_batch_size = micro_batch_size · data-parallel size · accumulation steps.
    """

    micro_batch_size: int = 1
    global_batch_size: int = 8


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW through Megatron-Core's optimizer."""

    lr: float = 1e-4
    min_lr: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """``cosine`` decays from lr to min_lr; both kinds warm up linearly over warmup_steps.

    Attributes:
        kind: what the learning rate does after the warm-up.
        steps: of the run, and of the decay.
        warmup_steps: steps until the rate is lr.
        patience: validations in a row without an improvement that end the run; 0: none do.
        min_improvement: by how much the held-out loss has to fall to be an improvement.
    """

    kind: Literal["cosine", "constant"] = "cosine"
    steps: int = 100
    warmup_steps: int = 0
    patience: int = 0
    min_improvement: float = 0.0


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """The loss on data that training does not read, measured while it runs.

    Attributes:
        interval: steps between validations; the last step is validated, too. 0: none at all.
        blend: what is read, as ``data.blend``; empty: the documents of ``data.blend`` that
            ``data.held_out`` holds out, and other samples of its generated parts.
        sequences: packed sequences of ``data.sequence_length`` tokens that a validation reads, the
            same each time, dealt to the parts by their weights; at least one a part.
        probes: generated tasks whose answers are looked at beside the loss: the share of documents all
            of whose learned tokens are the likeliest ones (needles, say). Not in ``align``.
        probe_sequences: packed sequences of each probe.
    """

    interval: int = 0
    blend: tuple[SourceConfig, ...] = ()
    sequences: int = 64
    probes: tuple[SourceConfig, ...] = ()
    probe_sequences: int = 16


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of stage 2 and the chunk of every linear-cross-entropy.

    Attributes:
        kl_weight: λ of λ·τ²·KL(teacher ‖ student) + (1−λ)·CE.
        temperature: τ.
        chunk_tokens: tokens whose logits exist at a time.
    """

    kl_weight: float = 0.9
    temperature: float = 1.0
    chunk_tokens: int = 1024


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The layout. Data parallel is what is left of the world.

    Attributes:
        tensor, context, pipeline: sizes.
        virtual_pipeline: model chunks per pipeline stage (interleaved schedule), or 1.
        sequence: Megatron's sequence parallelism over the tensor-parallel group.
        fa_partition: ``heads`` | ``sequence`` (design §6).
        distributed_optimizer: shard optimizer states over data-parallel ranks.
        overlap_grad_reduce, overlap_param_gather: Megatron-Core's overlaps (GPU).
    """

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    sequence: bool = False
    fa_partition: Literal["heads", "sequence"] = "heads"
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


@dataclasses.dataclass(frozen=True)
class RecomputeConfig:
    """Activation recomputation, as in Megatron-Core: ``none`` | ``selective`` | ``full``.

    ``selective`` recomputes ``modules``: of the attention's parts between the projections ``fa``,
    ``gdn`` and ``tail`` (gates, norm and scale), each from its own inputs; ``attention``, all three as
    one; ``mlp``. At long context ``fa`` is most of the work and keeps little, ``gdn`` and ``tail`` are
    little work and keep much.
    """

    granularity: Literal["none", "selective", "full"] = "none"
    modules: tuple[str, ...] = ("attention",)
    num_layers: int = 1


@dataclasses.dataclass(frozen=True)
class BackendConfig:
    """Kernels: ``auto`` takes the fastest that is installed and supports the case.

    Attributes:
        gated_delta_net: ``fla`` | ``torch``.
        full_attention: ``sdpa`` (cuDNN; varlen for unequal documents) | ``flash_attn`` | ``varlen`` |
            ``transformer_engine`` | ``torch``.
        fused_kernels: our own fused kernels (q/k preparation, convolution, fusion tail):
            ``triton`` | ``torch``.
        transformer_impl: linears and norms.
        streams: whether a layer's FA and GDN heads run side by side on a GPU: ``auto``: where neither
            communicates and FA has no rotary embedding, ``one``: never, ``two``: as ``auto``, and a run
            where that cannot be is refused.
    """

    gated_delta_net: Literal["auto", "fla", "torch"] = "auto"
    full_attention: Literal[
        "auto", "sdpa", "flash_attn", "varlen", "transformer_engine", "torch"
    ] = "auto"
    fused_kernels: Literal["auto", "triton", "torch"] = "auto"
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    streams: Literal["auto", "one", "two"] = "auto"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When and how the run is saved (always under ``<output>/checkpoints``).

    Attributes:
        interval: steps between saves; the last step is always saved.
        keep: how many checkpoints stay (0: all).
        resume: ``auto`` resumes from the newest checkpoint of this run and stops if that is damaged,
            ``fallback`` takes the newest undamaged one, ``never`` refuses
            an output folder that already holds one.
        save_optimizer: without it the last checkpoint can start the next stage but not be trained
            on; those before it, and that of a stop, hold the optimizer all the same.
        asynchronous: copy the state to the host, then write it while training goes on; costs host
            memory of one checkpoint, which ranks share.
    """

    interval: int = 1000
    keep: int = 3
    resume: Literal["auto", "fallback", "never"] = "auto"
    save_optimizer: bool = True
    asynchronous: bool = False


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """``metrics.jsonl`` is always written.

    Attributes:
        interval: steps between entries.
        gamma_interval: steps between entries that hold the heads' scales γ by layer; 0: never.
        tensorboard: write ``tensorboard/`` as well.
        wandb: ``none`` | ``offline`` (kept in the run's folder) | ``online``.
        wandb_project: its project.
        progress: a bar on stderr.
        peak_tflops: a device's peak in TFLOP/s, for the utilisation; 0: known GPUs only.
    """

    interval: int = 1
    gamma_interval: int = 10
    tensorboard: bool = True
    wandb: Literal["none", "offline", "online"] = "none"
    wandb_project: str = "megatron_hydra"
    progress: bool = True
    peak_tflops: float = 0.0


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """What a run does when something breaks.

    Attributes:
        timeout_seconds: no collective and no step may take longer: then the stacks are written and
            the process exits, which ends the job. The first step and every save get five times that.
        max_skipped_steps: steps in a row with a loss or gradient that is not finite, or a spike,
            which are skipped (on all ranks); one more ends the run. 0: the first ends it.
        spike_factor: skip a step whose loss or gradient norm is more than so many times the median
            of the last good steps; 0: never.
        spike_window: how many good steps; before there are so many, nothing is a spike.
        stop_seconds_before_limit: save and leave so long before the end of the SLURM job, even if
            SLURM sends no signal; 0: only when signalled.
    """

    timeout_seconds: int = 1800
    max_skipped_steps: int = 10
    spike_factor: float = 0.0
    spike_window: int = 64
    stop_seconds_before_limit: int = 120


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run of one verb.

    ``deterministic``: equal runs give equal bits on GPUs, too (slower there: attention without atomics,
    kernels that are not tuned); the CPU has no other kernels.
    """

    verb: Verb = "pretrain"
    output: PathText = ""
    seed: int = 1234
    precision: Literal["fp32", "bf16"] = "bf16"
    deterministic: bool = False
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = dataclasses.field(default_factory=RecomputeConfig)
    backend: BackendConfig = dataclasses.field(default_factory=BackendConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    faults: FaultsConfig = dataclasses.field(default_factory=FaultsConfig)
