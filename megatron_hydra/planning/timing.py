"""From work, traffic and launches to seconds: a roofline with assumed efficiencies, and the host's time."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable

from megatron_hydra.config.run import RunConfig
from megatron_hydra.planning.hardware import GPUS_PER_NODE, Efficiency, Gpu
from megatron_hydra.planning.tape.assembly import Part, Stage
from megatron_hydra.planning.tape.tensors import Sent, Work

UPDATE_BYTES = 102
"""Bytes read and written for each parameter in an update. Torch's AdamW over lists makes a pass for each
operation: decay of the weight 8 bytes, first moment 12, second moment 8 and 12, its root, correction and ε 8
each, the weight 16. In addition: the gradient's norm 4, clipping 8, the bf16 copy 6, the zeroed buffer 4."""

FOREACH_ELEMENTS = 320 * 65_536
"""Elements that one launch of torch's operators on lists of tensors covers (its blocks, their chunk)."""

FOREACH_CALLS = 15
"""Such operators in a step: 12 of AdamW, the gradient's norm, clipping, the copy to bf16 weights."""

STEP_LAUNCHES, BATCH_LAUNCHES = 30, 20
"""Further launches. Of a step: zeroed buffers, agreement of ranks, logged numbers. Of a micro-batch: copies to
the device, boundaries of documents, rotary tables."""

Seconds = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Launches:
    """Numbers of kernels, by what launches them.

    Attributes:
        torch: torch's operators, with collectives.
        triton: Triton, from Python.
    """

    torch: float = 0.0
    triton: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.torch + self.triton

    def plus(self, other: Launches, times: float = 1.0) -> Launches:
        """These launches, plus ``times`` times the others."""
        return Launches(self.torch + times * other.torch, self.triton + times * other.triton)


def count_launches(work: Iterable[Work], sent: Iterable[Sent]) -> Launches:
    """Launches of operators and collectives."""
    ours, collectives = list(work), sum(s.repeats for s in sent)
    return Launches(
        sum(w.launches * w.repeats for w in ours) + collectives,
        sum(w.triton * w.repeats for w in ours),
    )


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine of a job.

    Attributes:
        gpu: its data sheet.
        efficiency: assumed shares of the data sheet.
    """

    gpu: Gpu
    efficiency: Efficiency

    def seconds(self, work: Work) -> float:
        """One operator on the device: the longer of its arithmetic and its memory traffic."""
        share = self.efficiency
        attention = share.attention if work.phase != "backward" else share.attention_backward
        reached = {
            "matmul": share.matmul,
            "attention": attention,
            "varlen_attention": attention * share.varlen,
            "tail_attention": attention * share.tail,
            "delta_rule": share.delta_rule,
            "flash_qla": share.flash_qla or share.delta_rule,
            "solve": share.delta_rule,
            "memory": 1.0,
        }[work.unit]
        arithmetic = work.flops / (self.gpu.peak * reached)
        traffic = work.moved / (self.gpu.bandwidth * share.bandwidth)
        if work.unit in ("delta_rule", "flash_qla"):  # measured with all its kernels' traffic
            traffic = 0.0
        return max(arithmetic, traffic) * work.repeats

    def host(self, launches: Launches) -> float:
        """Host seconds for launches."""
        share = self.efficiency
        return launches.torch * share.launch + launches.triton * share.triton_launch

    def link(self, ranks_below: int) -> float:
        """Bytes/s between ranks of a group, within a node or between nodes."""
        if ranks_below <= GPUS_PER_NODE:
            return self.gpu.nvlink * self.efficiency.nvlink
        return self.gpu.network * self.efficiency.network


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest rank.

    Attributes:
        compute: arithmetic and memory traffic on the device, by phase.
        communication: seconds that are not hidden, by kind.
        waiting: seconds in which the device waits for the host's launches.
        bubble: seconds of waiting for other pipeline stages.
        update: the optimizer.
        host: host seconds for all launches; most of them pass while the device works.
        launches: of the step.
        forward_only: seconds of one micro-batch of a validation: a forward without a gradient.
    """

    compute: Seconds
    communication: Seconds
    waiting: float
    bubble: float
    update: float
    host: float
    launches: Launches
    forward_only: float

    @property
    def total(self) -> float:
        """All of it."""
        return (
            sum(self.compute.values())
            + sum(self.communication.values())
            + self.waiting
            + self.bubble
            + self.update
        )


def reach(axis: str, run: RunConfig, world: int) -> int:
    """Number of neighbouring ranks that a group along ``axis`` spans (tensor, context, data, pipeline)."""
    parallel = run.parallel
    inner = parallel.tensor * parallel.context
    return {
        "tensor": parallel.tensor,
        "context": inner,
        "tensor_context": inner,
        "data": world // parallel.pipeline,
        "pipeline": world,
    }[axis]


class Clocks:
    """The host, which launches in advance, and the device, which works in order.

    A part's kernels cannot start before the host begins to launch them, nor end before it has launched the last
    one. So if the host needs longer, the device waits. If the host is faster, it gets ahead, and it keeps this
    lead until the device catches up.
    """

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def run(self, host: float, device: float) -> None:
        """Add one part: seconds of the host's launches and of the device's work."""
        begin = max(self.device, self.host)
        self.host += host
        self.device = max(begin + device, self.host)

    @property
    def end(self) -> float:
        """The time when all launched work is done."""
        return max(self.host, self.device)


def elapsed(parts: list[tuple[float, float]], micro_batches: int) -> float:
    """Seconds of consecutive micro-batches, each of ``(host, device)`` parts."""
    clocks, ends = Clocks(), [0.0]
    simulated = min(micro_batches, 4)  # from here on, each one adds the same time
    for _ in range(simulated):
        for host, device in parts:
            clocks.run(host, device)
        ends.append(clocks.end)
    return ends[-1] + (micro_batches - simulated) * (ends[-1] - ends[-2])


def _seconds(
    machine: Machine, run: RunConfig, world: int, part: Part
) -> tuple[Seconds, Seconds, Launches]:
    """Times of a part: computation by phase, communication by kind, launches."""
    compute: Seconds = defaultdict(float)
    sent: Seconds = defaultdict(float)
    for work in part.work:
        compute[work.phase] += machine.seconds(work)
    for item in part.sent:
        link = machine.link(reach(item.axis, run, world))
        sent[item.kind] += (item.sent / link + machine.efficiency.latency) * item.repeats
    return compute, sent, count_launches(part.work, part.sent)


@dataclasses.dataclass(frozen=True)
class _Pace:
    """Times of one stage's micro-batches: device by phase and kind, launches of one, seconds of all, and
    seconds of one forward.
    """

    compute: Seconds
    communication: Seconds
    launches: Launches
    elapsed: float
    forward_only: float


def _pace(
    machine: Machine, run: RunConfig, world: int, order: list[Part], micro_batches: int
) -> _Pace:
    known: dict[int, tuple[Seconds, Seconds, Launches]] = {}
    forwards: dict[int, tuple[float, float]] = {}
    compute: Seconds = defaultdict(float)
    sent: Seconds = defaultdict(float)
    launches = Launches(BATCH_LAUNCHES)
    pairs = [(machine.host(launches), 0.0)]
    forward = list(pairs)
    for part in order:  # parts of equal layers are the same object
        if id(part) not in known:
            known[id(part)] = _seconds(machine, run, world, part)
            by_phase, by_kind, count = _seconds(machine, run, world, part.forward())
            device = sum(by_phase.values()) + sum(by_kind.values())
            forwards[id(part)] = (machine.host(count), device)
        by_phase, by_kind, count = known[id(part)]
        for total, more in ((compute, by_phase), (sent, by_kind)):
            for name, seconds in more.items():
                total[name] += seconds * micro_batches
        launches = launches.plus(count)
        pairs.append((machine.host(count), sum(by_phase.values()) + sum(by_kind.values())))
        forward.append(forwards[id(part)])
    return _Pace(compute, sent, launches, elapsed(pairs, micro_batches), elapsed(forward, 1))


def update_launches(trained: int) -> Launches:
    """Launches of gradient norm, clipping and AdamW over lists of all tensors, and of the rest of a step.

    Args:
        trained: elements that the rank updates.
    """
    return Launches(FOREACH_CALLS * math.ceil(trained / FOREACH_ELEMENTS) + STEP_LAUNCHES)


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
        stages: of the computed pipeline ranks; the slowest one decides the time.
        traffic: bytes that a rank sends once per step (``data``) and per micro-batch (``pipeline``).
        trained: parameters that the rank updates.
    """
    efficiency, parallel = machine.efficiency, run.parallel
    paces = [_pace(machine, run, world, stage.order, micro_batches) for stage in stages]
    slowest = max(paces, key=lambda pace: pace.elapsed)
    compute, sent = dict(slowest.compute), defaultdict(float, slowest.communication)
    busy = sum(compute.values()) + sum(sent.values())
    if traffic["pipeline"]:
        link = machine.link(reach("pipeline", run, world))
        sent["pipeline"] += (traffic["pipeline"] / link + efficiency.latency) * micro_batches
    bubble = slowest.elapsed * (parallel.pipeline - 1) / (micro_batches * parallel.virtual_pipeline)
    data = traffic["data"] / machine.link(reach("data", run, world))
    sent["data"] += data * (1 - efficiency.overlap)
    once = update_launches(trained)
    update = trained * UPDATE_BYTES / (machine.gpu.bandwidth * efficiency.bandwidth)
    # An operator on a list is one call, for any number of kernels.
    calls = machine.host(Launches(FOREACH_CALLS + STEP_LAUNCHES))
    waits = slowest.elapsed - busy + max(0.0, calls - update)
    launches = once.plus(slowest.launches, micro_batches)
    host = machine.host(slowest.launches) * micro_batches + calls
    return StepTime(
        compute, sent, waits, bubble, update, host, launches,
        slowest.forward_only * parallel.pipeline,
    )  # fmt: skip
