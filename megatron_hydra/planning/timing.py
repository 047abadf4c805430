"""From work and traffic to seconds: a roofline with assumed efficiencies."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from megatron_hydra.config.run import RunConfig
from megatron_hydra.planning.hardware import GPUS_PER_NODE, Efficiency, Gpu
from megatron_hydra.planning.tape.assembly import Stage
from megatron_hydra.planning.tape.tensors import Work

UPDATE_BYTES = 30
"""Read and written per parameter by AdamW: gradient 4, weight and both moments 4 each, twice, and the
bf16 weight 2."""


Seconds = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What runs the job.

    Attributes:
        gpu: its data sheet.
        efficiency: assumed shares of it.
    """

    gpu: Gpu
    efficiency: Efficiency

    def seconds(self, work: Work) -> float:
        """One operator: the longer of its arithmetic and its memory traffic."""
        share = self.efficiency
        reached = {
            "matmul": share.matmul,
            "attention": share.attention if work.phase != "backward" else share.attention_backward,
            "delta_rule": share.delta_rule,
            "solve": share.delta_rule,
            "memory": 1.0,
        }[work.unit]
        arithmetic = work.flops / (self.gpu.peak * reached)
        traffic = work.moved / (self.gpu.bandwidth * share.bandwidth)
        if work.unit == "delta_rule":  # its share was measured, all its kernels' traffic included
            traffic = 0.0
        return max(arithmetic, traffic) * work.repeats

    def link(self, ranks_below: int) -> float:
        """Bytes/s between ranks of a group of that reach: inside a node or between nodes."""
        if ranks_below <= GPUS_PER_NODE:
            return self.gpu.nvlink * self.efficiency.nvlink
        return self.gpu.network * self.efficiency.network


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest rank.

    Attributes:
        compute: arithmetic and memory traffic, by phase.
        communication: by kind, what is not hidden.
        bubble: waiting for other pipeline stages.
        update: the optimizer.
    """

    compute: Seconds
    communication: Seconds
    bubble: float
    update: float

    @property
    def total(self) -> float:
        """All of it."""
        return (
            sum(self.compute.values())
            + sum(self.communication.values())
            + self.bubble
            + self.update
        )


def reach(axis: str, run: RunConfig, world: int) -> int:
    """How many neighbouring ranks a group along ``axis`` spans (order: tensor, context, data, pipeline)."""
    parallel = run.parallel
    inner = parallel.tensor * parallel.context
    return {
        "tensor": parallel.tensor,
        "context": inner,
        "tensor_context": inner,
        "data": world // parallel.pipeline,
        "pipeline": world,
    }[axis]


def step_time(
    machine: Machine,
    run: RunConfig,
    world: int,
    stages: list[Stage],
    micro_batches: int,
    traffic: dict[str, float],
    trained: int,
) -> StepTime:
    """Seconds of a step.

    Args:
        stages: of the pipeline ranks that were looked at; the slowest one sets the pace.
        traffic: bytes that a rank sends once a step (``data``) and for every micro-batch
            (``pipeline``).
        trained: parameters that the rank updates.
    """
    efficiency, parallel = machine.efficiency, run.parallel
    best: tuple[float, Seconds, Seconds] = (-1.0, {}, {})
    for stage in stages:
        compute: Seconds = defaultdict(float)
        sent: Seconds = defaultdict(float)
        for work in stage.work:
            compute[work.phase] += machine.seconds(work) * micro_batches
        for item in stage.sent:
            link = machine.link(reach(item.axis, run, world))
            seconds = (item.sent / link + efficiency.latency) * item.repeats
            sent[item.kind] += seconds * micro_batches
        total = sum(compute.values()) + sum(sent.values())
        if total > best[0]:
            best = (total, compute, sent)
    total, compute, sent = best
    if traffic["pipeline"]:
        link = machine.link(reach("pipeline", run, world))
        sent["pipeline"] += (traffic["pipeline"] / link + efficiency.latency) * micro_batches
    bubble = total * (parallel.pipeline - 1) / (micro_batches * parallel.virtual_pipeline)
    data = traffic["data"] / machine.link(reach("data", run, world))
    sent["data"] += data * (1 - efficiency.overlap)
    update = trained * UPDATE_BYTES / (machine.gpu.bandwidth * efficiency.bandwidth)
    return StepTime(compute, sent, bubble, update)
