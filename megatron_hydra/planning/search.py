"""All possible layouts of a job, and those that fit, the fastest first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import (
    BatchConfig,
    DataConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    TeacherConfig,
    Verb,
)
from megatron_hydra.errors import HydraError
from megatron_hydra.planning.hardware import GIB, GPUS_PER_NODE
from megatron_hydra.planning.plan import Plan, plan_run
from megatron_hydra.planning.timing import Machine

RECOMPUTE = (
    RecomputeConfig("none"),
    RecomputeConfig("selective", ("attention",)),
    RecomputeConfig("selective", ("attention", "mlp")),
    RecomputeConfig("full"),
)
"""In order of cost: the cheapest one that fits is the fastest, so the search stops there."""

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
SHORTEST_SHARD = 1024
"""Tokens below which a sequence is not cut further."""

MOST_BATCH_GROWTH = 2
"""After rounding up, a step has less than so many times the requested sequences."""

MOST_TOKENS_PER_RANK = 2**15
"""Further sequences are not added to a micro-batch of this size."""


@dataclasses.dataclass(frozen=True)
class Job:
    """The job: what to train, and on how many GPUs.

    Attributes:
        verb: the stage.
        sequence_length: tokens.
        tokens_per_step: of all ranks, at least one sequence. It is rounded up to a number of sequences that the
            replicas can share equally.
        gpus: number of GPUs.
        precision: ``bf16`` or ``fp32``.
        distributed_optimizer: whether optimizer states are sharded.
        loss_chunk: number of tokens whose logits exist at a time.
        gated_delta_net: ``fla``, or ``torch``: the plain twin, as on a GPU without FLA.
    """

    verb: Verb
    sequence_length: int
    tokens_per_step: int
    gpus: int
    precision: str = "bf16"
    distributed_optimizer: bool = True
    loss_chunk: int = 2048
    gated_delta_net: Literal["fla", "torch"] = "fla"

    @property
    def sequences(self) -> int:
        """Requested number of sequences of a step."""
        return max(1, self.tokens_per_step // self.sequence_length)

    def batch(self, parallel: ParallelConfig, micro: int) -> int:
        """Sequences of a step under a layout: all replicas have equally many micro-batches."""
        ranks = parallel.tensor * parallel.context * parallel.pipeline
        at_a_time = micro * (self.gpus // ranks)
        return -(-self.sequences // at_a_time) * at_a_time

    def run(self, parallel: ParallelConfig, micro: int, recompute: RecomputeConfig) -> RunConfig:
        """The config of one layout."""
        base = RunConfig(verb=self.verb)
        return dataclasses.replace(
            base,
            precision=self.precision,  # type: ignore[arg-type]
            teacher=TeacherConfig("teacher" if self.verb in ("align", "distill") else ""),
            data=DataConfig(sequence_length=self.sequence_length),
            batch=BatchConfig(micro, self.batch(parallel, micro)),
            loss=dataclasses.replace(base.loss, chunk_tokens=self.loss_chunk),
            parallel=parallel,
            recompute=recompute,
            backend=dataclasses.replace(base.backend, gated_delta_net=self.gated_delta_net),
        )


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def layouts(model: ModelConfig, job: Job) -> Iterator[tuple[ParallelConfig, int]]:
    """Every layout and micro-batch size that the GPUs, the model and the batch allow."""
    for tensor, context, pipeline in _sizes(model, job):
        modes = ["heads"]
        if model.is_hybrid and tensor > 1 and not model.switches.mixes_in_every_head:
            modes.append("sequence")
        for micro, mode in itertools.product(MICRO_BATCHES, modes):
            tokens = micro * job.sequence_length // context
            parallel = ParallelConfig(
                tensor=tensor, context=context, pipeline=pipeline, sequence=tensor > 1,
                fa_partition=mode,  # type: ignore[arg-type]
                distributed_optimizer=job.distributed_optimizer,
            )  # fmt: skip
            fits = micro == 1 or tokens <= MOST_TOKENS_PER_RANK
            if fits and job.batch(parallel, micro) < MOST_BATCH_GROWTH * job.sequences:
                yield parallel, micro


def _sizes(model: ModelConfig, job: Job) -> Iterator[tuple[int, int, int]]:
    for tensor in _powers(min(GPUS_PER_NODE, job.gpus, model.num_query_heads)):
        if model.ffn_hidden_size % tensor:
            continue
        for context in _powers(job.gpus // tensor):
            if context > 1 and job.sequence_length // context < SHORTEST_SHARD:
                continue
            for pipeline in (1, 2, 4):
                divides = job.gpus % (tensor * context * pipeline) == 0
                if divides and model.num_layers % pipeline == 0:
                    yield tensor, context, pipeline


def _check(job: Job) -> None:
    if job.gpus < 1 or job.sequence_length < 1:
        raise HydraError("--gpus and --seq must be at least 1")


def search(model: ModelConfig, job: Job, machine: Machine) -> list[Plan]:
    """Plans that fit, the most tokens per second first.

    Raises:
        HydraError: none fits; names the missing memory of the smallest one, and its parts.
    """
    _check(job)
    found: list[Plan] = []
    leanest: Plan | None = None
    refused = ""
    for parallel, micro in layouts(model, job):
        for recompute in RECOMPUTE:
            if job.verb == "align" and (
                recompute.granularity == "full" or "mlp" in recompute.modules
            ):
                continue
            try:
                plan = plan_run(model, job.run(parallel, micro, recompute), job.gpus, machine)
            except HydraError as error:
                refused = str(error)
                break
            if leanest is None or plan.memory.total < leanest.memory.total:
                leanest = plan
            if plan.fits:
                found.append(plan)
                break
    if not found:
        raise HydraError(_does_not_fit(job, machine, leanest, refused))
    # Of layouts that differ only in the micro-batch, the fastest is enough.
    best: dict[tuple[object, ...], Plan] = {}
    for plan in sorted(found, key=lambda p: -p.tokens_per_second):
        parallel = plan.run.parallel
        key = (parallel.tensor, parallel.context, parallel.pipeline, parallel.fa_partition)
        best.setdefault(key, plan)
    return list(best.values())


def _does_not_fit(job: Job, machine: Machine, leanest: Plan | None, refused: str) -> str:
    where = f"{job.verb} at {job.sequence_length:,} tokens on {job.gpus} × {machine.gpu.name}"
    if leanest is None:
        return (
            f"{where}: no layout can be built for {job.sequences} sequences a step"
            f"{': ' + refused if refused else ''}; with more --tokens-per-step there is more to share, "
            "with fewer --gpus fewer have to share it"
        )
    usable = machine.gpu.memory * machine.efficiency.usable
    parts = leanest.memory.peak.most_common(3)
    binding = parts[0][0]
    named = ", ".join(f"{part} {count / GIB:.1f}" for part, count in parts)
    layout = " ".join(f"{key}={value}" for key, value in leanest.layout().items())
    return (
        f"{where} does not fit: the leanest layout ({layout}) needs {leanest.memory.total / GIB:.1f} "
        f"GiB a GPU of {usable / GIB:.1f} usable; what binds is {binding} (GiB: {named}). {_advice(binding)}"
    )


def _advice(binding: str) -> str:
    held = ("parameters", "gradient buffer", "optimizer", "teacher")
    if binding in held:
        return (
            "Use more GPUs, or GPUs with more memory: weights and their states are split over them."
        )
    if binding == "loss":
        return "Make --loss-chunk smaller."
    return "Use more GPUs (longer context-parallel groups) or a shorter --seq."
