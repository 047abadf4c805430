"""Forward FLOPs of one head, which show how evenly a head partition loads its ranks.

A multiplication and an addition count as two. Norms, gates and rotary are omitted: they are linear in the
tokens and small compared with projections.
"""

from __future__ import annotations

import dataclasses

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.model.local_heads import LocalHeads
from megatron_hydra.ops.linear_rules import rule_of_model
from megatron_hydra.parallel.head_partition import LayerPartition


def full_attention_flops(length: int, head_dim: int, window: int | None = None) -> int:
    """FLOPs of scores and weighted values of one causal head over ``length`` tokens: 4·d for every pair.

    A query sees the last ``window`` tokens, with its own, or all tokens.
    """
    beyond = max(0, length - window) if window else 0
    return 2 * head_dim * (length * (length + 1) - beyond * (beyond + 1))


@dataclasses.dataclass(frozen=True)
class RankLoad:
    """Forward FLOPs of one tensor-parallel rank in one layer.

    Attributes:
        full_attention: attention cores of FA heads.
        gated_delta_net: recurrences of GDN heads.
        projections: input and output projections of all heads.
    """

    full_attention: float
    gated_delta_net: float
    projections: float

    @property
    def total(self) -> float:
        """The sum of all."""
        return self.full_attention + self.gated_delta_net + self.projections


def rank_loads(
    model: ModelConfig, partition: LayerPartition, sequence_length: int
) -> tuple[RankLoad, ...]:
    """FLOPs of every rank in one layer, for one sequence of ``sequence_length`` tokens."""
    loads = []
    d, hidden = model.head_dim, model.hidden_size
    rule = rule_of_model(model.switches)
    for rank, share in enumerate(partition.full_attention_share()):
        heads = LocalHeads(model, partition, rank)
        rows = sum(s.rows for s in heads.in_segments)
        replicated = sum(s.rows for s in (*heads.fa_in_segments, *heads.shared_kv_segments))
        columns = len(heads.sharded) * d
        columns_replicated = len(heads.replicated_fa) * d
        weights = rows + columns + (replicated + columns_replicated) / partition.tp_size
        loads.append(
            RankLoad(
                full_attention=share
                * full_attention_flops(sequence_length, d, model.switches.fa_window),
                gated_delta_net=len(heads.gdn) * rule.flops(sequence_length, d),
                projections=2.0 * sequence_length * hidden * weights,
            )
        )
    return tuple(loads)


def imbalance(loads: tuple[RankLoad, ...]) -> float:
    """Largest total divided by the mean: the slowest rank's work, relative to an even split."""
    totals = [load.total for load in loads]
    return max(totals) / (sum(totals) / len(totals))
