"""The plan of a run on a machine: memory, FLOPs, traffic and time of one layout."""

from __future__ import annotations

import dataclasses
from collections import Counter

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.config.validate import accumulation_steps, check_layout, data_parallel_size
from megatron_hydra.planning.memory import Memory, rank_memory
from megatron_hydra.planning.tape.assembly import Stage
from megatron_hydra.planning.tape.rank import Rank
from megatron_hydra.planning.tape.stage import StageBuilder
from megatron_hydra.planning.timing import Machine, StepTime, step_time


@dataclasses.dataclass(frozen=True)
class Plan:
    """The figures of one layout.

    Attributes:
        run: the layout.
        world: GPUs.
        micro_batches: of a step, on each data-parallel rank.
        memory: of the fullest rank.
        flops: of a step on the busiest rank, by phase; recomputation is ``recompute``.
        sent: bytes that a rank sends in a step, by kind.
        time: of a step.
        fits: whether the memory is enough.
    """

    run: RunConfig
    world: int
    micro_batches: int
    memory: Memory
    flops: Counter[str]
    sent: Counter[str]
    time: StepTime
    fits: bool

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step on all ranks together."""
        return self.run.batch.global_batch_size * self.run.data.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole job."""
        return self.tokens_per_step / self.time.total

    def validation_seconds(self, sequences: int) -> float:
        """Seconds of one validation, whose sequences the replicas share by micro-batches."""
        at_a_time = self.run.batch.micro_batch_size * self.data_parallel
        return -(-sequences // at_a_time) * self.time.forward_only

    @property
    def data_parallel(self) -> int:
        """Size of the data-parallel group."""
        return data_parallel_size(self.run, self.world)

    def layout(self) -> dict[str, object]:
        """The layout in the config's words."""
        parallel, recompute = self.run.parallel, self.run.recompute
        again: str = recompute.granularity
        if again == "selective":
            again += " " + "+".join(recompute.modules)
        return {
            "tensor": parallel.tensor, "context": parallel.context, "pipeline": parallel.pipeline,
            "data": self.data_parallel, "sequence": parallel.sequence,
            "fa_partition": parallel.fa_partition, "recompute": again,
            "micro_batch_size": self.run.batch.micro_batch_size,
        }  # fmt: skip


def _traffic(run: RunConfig, model: ModelConfig, rank: Rank, trained: int) -> dict[str, float]:
    """Bytes that a rank sends once per step for data parallelism, and per micro-batch between stages."""
    shards = rank.data_parallel * rank.cp
    share = (shards - 1) / shards
    # fp32 gradients are scattered and weights gathered, or gradients are all-reduced.
    weights = rank.size if run.parallel.distributed_optimizer else 4
    pipeline = 0.0
    if run.parallel.pipeline > 1:
        streams = {"align": 1, "distill": 4}.get(run.verb, 2)
        pipeline = float(streams * rank.rows * model.hidden_size * rank.size)
    return {"data": (4.0 + weights) * trained * share, "pipeline": pipeline}


def plan_run(
    model: ModelConfig, run: RunConfig, world: int, machine: Machine, *, gpu: bool = True
) -> Plan:
    """Memory, FLOPs, traffic and time of a run.

    It computes the first pipeline stage (most micro-batches in flight) and the last one (the loss), each on the
    tensor-parallel rank with the most FA heads.

    Args:
        model: the trained model.
        run: verb, layout, batch, precision, recomputation.
        world: GPUs.
        machine: the kind of GPU.
        gpu: whether GPU kernels run; otherwise the torch twins.

    Raises:
        HydraError: the layout cannot work for this model, world or batch.
    """
    check_layout(run, world, model, model.dense() if run.verb in ("align", "distill") else None)
    micro_batches = accumulation_steps(run, world)
    replicas = data_parallel_size(run, world)
    memories, stages, traffic = [], [], {"data": 0.0, "pipeline": 0.0}
    for pp_rank in _stages_looked_at(run):
        rank = Rank(run, pp_rank=pp_rank, data_parallel=replicas, gpu=gpu)
        builder = StageBuilder(model, rank, busiest=True)
        stages.append(stage := builder.run())
        memories.append(memory := rank_memory(builder, stage, micro_batches))
        once = _traffic(run, model, rank, memory.trained)
        traffic = {kind: max(traffic[kind], once[kind]) for kind in traffic}
    trained = max(m.trained for m in memories)
    if run.parallel.distributed_optimizer:
        trained //= replicas * run.parallel.context
    time = step_time(machine, run, world, stages, micro_batches, traffic, trained)
    busiest = max(stages, key=_flops)
    flops: Counter[str] = Counter()
    sent: Counter[str] = Counter(
        data=int(traffic["data"]), pipeline=int(traffic["pipeline"]) * micro_batches
    )
    for work in busiest.work:
        flops[work.phase] += work.flops * work.repeats * micro_batches  # type: ignore[assignment]
    for item in busiest.sent:
        sent[item.kind] += int(item.sent * item.repeats * micro_batches)
    memory = max(memories, key=lambda m: m.total)
    usable = machine.gpu.memory * machine.efficiency.usable
    return Plan(run, world, micro_batches, memory, flops, +sent, time, fits=memory.total <= usable)


def expected_memory(model: ModelConfig, run: RunConfig, world: int, *, gpu: bool = True) -> Memory:
    """Memory of the fullest rank, as in :func:`plan_run`; it does not depend on the machine.

    Raises:
        HydraError: the layout cannot work for this model, world or batch.
    """
    check_layout(run, world, model, model.dense() if run.verb in ("align", "distill") else None)
    micro_batches, replicas = accumulation_steps(run, world), data_parallel_size(run, world)
    memories = []
    for pp_rank in _stages_looked_at(run):
        rank = Rank(run, pp_rank=pp_rank, data_parallel=replicas, gpu=gpu)
        builder = StageBuilder(model, rank, busiest=True)
        memories.append(rank_memory(builder, builder.run(), micro_batches))
    return max(memories, key=lambda memory: memory.total)


def _stages_looked_at(run: RunConfig) -> list[int]:
    return sorted({0, run.parallel.pipeline - 1})


def _flops(stage: Stage) -> float:
    return sum(work.flops * work.repeats for work in stage.work)
