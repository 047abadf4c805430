"""Config of a run: one YAML file per run, one section per topic.

Units: tokens, steps, bytes or seconds as each key says. ``loading.load_run_config`` builds it from
YAML plus ``section.key=value`` overrides, and rejects unknown keys by name. In paths, ``~`` and
``$VARIABLE`` are expanded.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_hydra.paths import PathText

Verb = Literal["pretrain", "align", "distill", "finetune"]


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The model to train. ``checkpoint`` is a Megatron checkpoint made by ``tools/hf_to_megatron.py`` or
    by an earlier stage. A wrong path is an error; training never starts from random weights instead.
    If ``fingerprint`` (``sha256:`` and the hash of manifest.json) is given, the checkpoint must match it.
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
    """One source of a blend.

    Attributes:
        kind: ``indexed`` (Megatron ``.bin/.idx``) or ``synthetic`` (generated on the fly).
        path: prefix of the ``.bin/.idx`` pair, for ``indexed``.
        task: generator name, for ``synthetic``.
        options: the generator's keyword arguments.
        weight: share of the *tokens* from this source, relative to the other sources.
        upsample: for ``indexed``, smallest document length in tokens → how often such a document
            appears in an epoch, e.g. ``{0: 0.5, 32768: 2, 131072: 4}``; 0 drops the bucket. The bucket
            of a document is the largest key not above its length. Shorter documents appear once.
        max_epochs: reject a run that would read this source more often; 0: no limit, only a log line.
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
    """Training data.

    Attributes:
        blend: the sources and their weights.
        sequence_length: tokens of one packed sequence.
        tokenizer: path or Hub name of an HF tokenizer (needed by ``synthetic`` sources).
        packing: ``best_fit`` | ``split_long`` | ``concat_chunk``.
        seed: seed of shuffling and of generators.
        cache_dir: folder of the packing indices; empty: ``.packs`` beside the data.
        token_budget: largest number of tokens (padding included) of this stage; 0: no limit. A run
            whose steps need more is rejected before it starts.
        held_out: share of the documents of every ``indexed`` source that is reserved for
            ``validation``; training never reads them. The choice depends only on the document's index
            in its file, so stages with the same share hold out the same documents.
        phase: raise it by one to change ``blend`` or ``batch.global_batch_size`` when a run is resumed:
            sources that stay continue at their position, and the optimizer is kept. Without a new
            phase, such a change is rejected.
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
        kind: shape of the learning rate after the warm-up.
        steps: number of steps of the run and of the decay.
        warmup_steps: steps until the learning rate reaches lr.
        patience: end the run after this many validations in a row without improvement; 0: never.
        min_improvement: smallest decrease of the held-out loss that counts as an improvement.
    """

    kind: Literal["cosine", "constant"] = "cosine"
    steps: int = 100
    warmup_steps: int = 0
    patience: int = 0
    min_improvement: float = 0.0


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Validation: the loss on data that training does not read, measured during the run.

    Attributes:
        interval: steps between validations; the last step is validated too. 0: no validation.
        blend: validation data, as ``data.blend``; empty: the held-out documents of ``data.blend``
            (``data.held_out``), and other samples of its generated sources.
        sequences: packed sequences of ``data.sequence_length`` tokens per validation, the same each
            time. They are split between the sources by weight, at least one per source.
        probes: generated tasks whose accuracy is measured too: the share of documents in which every
            loss token is the likeliest one. For example needles. Not available in ``align``.
        probe_sequences: packed sequences of each probe.
    """

    interval: int = 0
    blend: tuple[SourceConfig, ...] = ()
    sequences: int = 64
    probes: tuple[SourceConfig, ...] = ()
    probe_sequences: int = 16


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Loss weights of stage 2, and the chunk size of every linear-cross-entropy.

    Attributes:
        kl_weight: λ of λ·τ²·KL(teacher ‖ student) + (1−λ)·CE.
        temperature: τ.
        chunk_tokens: tokens per chunk; logits exist for one chunk at a time.
        logits: ``fp32``, or ``weights``: in the LM head's dtype, as losses that read a model's own logits see
            them. bf16 rounds a logit to 8 bits; its softmax is computed in fp32 either way.
    """

    kl_weight: float = 0.9
    temperature: float = 1.0
    chunk_tokens: int = 1024
    logits: Literal["fp32", "weights"] = "fp32"


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The parallel layout. Data parallelism uses the remaining ranks.

    Attributes:
        tensor, context, pipeline: sizes of these parallelisms.
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

    ``selective`` recomputes ``modules``. ``fa``, ``gdn`` and ``tail`` (gates, norm and scale) are parts of
    the attention between its projections, each recomputed from its own inputs. ``attention`` is all three
    as one. ``mlp`` is the MLP. At long context ``fa`` needs most of the compute and little memory; ``gdn``
    and ``tail`` need little compute and much memory.
    """

    granularity: Literal["none", "selective", "full"] = "none"
    modules: tuple[str, ...] = ("attention",)
    num_layers: int = 1


@dataclasses.dataclass(frozen=True)
class BackendConfig:
    """Kernels: ``auto`` selects the fastest installed kernel that supports the case.

    Attributes:
        gated_delta_net: ``fla`` | ``fla_cp`` (as ``fla``, but with FLA's own context parallelism, without
            FlashQLA) | ``torch``.
        full_attention: ``sdpa`` (cuDNN; varlen for unequal documents) | ``flash_attn`` | ``varlen`` |
            ``transformer_engine`` | ``torch``.
        fused_kernels: our own fused kernels (q/k preparation, convolution, fusion tail):
            ``triton`` | ``torch``.
        transformer_impl: linears and norms.
        streams: whether FA and GDN heads of a layer run concurrently on a GPU. ``auto``: if neither
            communicates and FA has no rotary embedding. ``one``: never. ``two``: as ``auto``, but a run
            that cannot do it is rejected.
    """

    gated_delta_net: Literal["auto", "fla", "fla_cp", "torch"] = "auto"
    full_attention: Literal[
        "auto", "sdpa", "flash_attn", "varlen", "transformer_engine", "torch"
    ] = "auto"
    fused_kernels: Literal["auto", "triton", "torch"] = "auto"
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    streams: Literal["auto", "one", "two"] = "auto"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When and how checkpoints are saved (always under ``<output>/checkpoints``).

    Attributes:
        interval: steps between saves; the last step is always saved.
        keep: number of newest checkpoints to keep (0: all).
        resume: ``auto`` resumes from the newest checkpoint of this run, and fails if it is damaged.
            ``fallback`` resumes from the newest undamaged checkpoint. ``never`` rejects an output
            folder that already has a checkpoint.
        save_optimizer: if false, the last checkpoint has no optimizer state: it can start the next
            stage, but this run cannot be continued. Earlier checkpoints, and the checkpoint of a stop,
            always include the optimizer.
        asynchronous: copy the state to host memory, then write it while training continues. It needs
            host memory for one checkpoint, shared between the ranks.
    """

    interval: int = 1000
    keep: int = 3
    resume: Literal["auto", "fallback", "never"] = "auto"
    save_optimizer: bool = True
    asynchronous: bool = False


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Logging. ``metrics.jsonl`` is always written.

    Attributes:
        interval: steps between entries.
        gamma_interval: steps between entries with the head scales γ of every layer; 0: never.
        tensorboard: also write ``tensorboard/``.
        wandb: ``none`` | ``offline`` (kept in the run's folder) | ``online``.
        wandb_project: project name for wandb.
        progress: show a progress bar on stderr.
        peak_tflops: peak of a device in TFLOP/s, for the utilisation; 0: use the table of known GPUs.
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
    """Fault handling.

    Attributes:
        timeout_seconds: time limit of a collective and of a step. After it, the process prints its
            stacks and exits, which ends the job. The first step and every save get five times this.
        max_skipped_steps: largest number of skipped steps in a row; one more ends the run. A step is
            skipped on all ranks if its loss or gradient is not finite, or is a spike.
        spike_factor: skip a step if its loss or gradient norm is more than this many times the median
            of the last good steps; 0: never.
        spike_window: number of good steps in the median; with fewer, no step is a spike.
        stop_seconds_before_limit: save and exit this long before the time limit of the SLURM job, even
            without a signal; 0: only after a signal.
    """

    timeout_seconds: int = 1800
    max_skipped_steps: int = 10
    spike_factor: float = 0.0
    spike_window: int = 64
    stop_seconds_before_limit: int = 120


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run of one verb.

    ``deterministic``: equal runs give equal bits on GPUs too. It is slower there: attention without atomics,
    and kernels without autotuning. CPU kernels are always deterministic.
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
