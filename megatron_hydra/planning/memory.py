"""A rank's peak memory by part."""

from __future__ import annotations

import dataclasses
from collections import Counter

from megatron_hydra.planning.parameters import held_bytes, stage_parameters
from megatron_hydra.planning.tape.assembly import Bytes, Stage
from megatron_hydra.planning.tape.stage import StageBuilder, stage_layers


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        held: bytes that stay between steps, by part.
        peak: bytes at the peak, by part, with ``held``.
        trained: elements that this rank trains.
        parameters: elements of the trained model on this rank.
    """

    held: Bytes
    peak: Bytes
    trained: int
    parameters: int

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak.values())


def in_flight(builder: StageBuilder, micro_batches: int) -> float:
    """Micro-batches whose activations a stage keeps at once (1F1B, interleaved or not)."""
    rank, parallel = builder.rank, builder.rank.run.parallel
    if rank.run.verb == "align" or parallel.pipeline == 1:
        return 1.0
    behind = parallel.pipeline - rank.pp_rank
    chunks = parallel.virtual_pipeline
    if chunks == 1:
        return float(min(behind, micro_batches))
    warm_up = 2 * (behind - 1) + (chunks - 1) * parallel.pipeline + 1
    return min(warm_up, micro_batches * chunks) / chunks


def rank_memory(builder: StageBuilder, stage: Stage, micro_batches: int) -> Memory:
    """The memory of a rank.

    Args:
        builder: the stage, for its shapes.
        stage: what a micro-batch does on it.
        micro_batches: of a step.
    """
    rank, model, run = builder.rank, builder.model, builder.rank.run
    layers = stage_layers(model, rank)
    ours = stage_parameters(
        model, [builder.heads(i) for i in layers], rank.tp, builder.is_first, builder.is_last
    )
    theirs = []
    if builder.teacher is not None:
        heads = [builder.heads(i, teacher=True) for i in layers]
        theirs = stage_parameters(
            builder.teacher, heads, rank.tp, builder.is_first, builder.is_last
        )
    held = held_bytes(
        ours, theirs, size=rank.size, trained="self_attention" if run.verb == "align" else "",
        distributed=run.parallel.distributed_optimizer, shards=rank.data_parallel * rank.cp,
        gpu=rank.gpu,
    )  # fmt: skip
    constant: Bytes = Counter(
        {
            "parameters": held.parameters,
            "gradient buffer": held.gradients,
            "optimizer": held.optimizer,
            "teacher": held.teacher,
        }
    )
    if run.parallel.sequence:
        constant["gather buffer"] = rank.tokens * model.hidden_size * rank.size
    during: Bytes = Counter(constant)
    during["batch and tables"] = _tables(builder) + micro_batches * rank.tokens * (8 + 8 + 4 + 8)
    waiting = in_flight(builder, micro_batches) - 1
    during.update({part: int(waiting * count) for part, count in stage.kept.items()})
    during.update(stage.peak)
    updating: Bytes = Counter(constant)
    updating["optimizer update"] = held.update
    peak = max(during, updating, key=lambda parts: sum(parts.values()))
    return Memory(
        Counter({part: count for part, count in constant.items() if count}),
        Counter({part: count for part, count in peak.items() if count}),
        held.trained,
        sum(p.numel for p in ours),
    )


def _tables(builder: StageBuilder) -> int:
    """Rotary tables of one stream, shared by all layers: cosine and sine in fp32."""
    model, rank = builder.model, builder.rank
    turned = rank.tokens if any(model.gdn_heads(i) for i in range(model.num_layers)) else 0
    dense = not model.is_hybrid or builder.teacher is not None
    if dense or model.has_rotary_fa:
        turned = rank.tokens  # teacher and student share one table, because their keys are equal
    return turned * model.head_dim * 2 * 4
