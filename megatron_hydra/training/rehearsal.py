"""Call a run's kernels once, layer by layer, on one device, so that they are compiled before the run starts.

Kernels depend on the layout, the lengths and the number of heads of each kind on a rank. Every combination
is compiled separately. A *scene* is one combination: a layer of the run with the shapes of one rank, and its
loss, forward and backward by the run's own verb. Other ranks are not needed: collectives return at once
(:func:`~megatron_hydra.parallel.world.rehearsed_world`). Weights and tokens are random.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable, Iterator

import torch
from megatron.core.models.gpt import GPTModel

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.config.validate import rounded_stream_length
from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.model.layer_spec import kernel_case
from megatron_hydra.model.local_heads import LocalHeads
from megatron_hydra.ops import tilelang_kernels
from megatron_hydra.ops.backends import choose_kernels
from megatron_hydra.ops.self_check import call_delta_rules, check_kernels, postponed
from megatron_hydra.parallel.head_partition import plan_model
from megatron_hydra.parallel.world import World, rehearsed_world
from megatron_hydra.training.setup import build_chunks, freeze, wrap_for_training
from megatron_hydra.training.step import run_micro_batches
from megatron_hydra.transfer.local_batch import local_batch
from megatron_hydra.transfer.verb import Verb
from megatron_hydra.transfer.verbs import VERBS
from megatron_hydra.watchdog import feed_watchdog

GATE_BIASES = (0.0, -12.0)
"""``dt_bias`` of fast and slow decays (half-lives of one and of a hundred thousand tokens). FlashQLA splits
long streams into parts if states decay fast, and uses other kernels for that."""

_WEIGHT_SCALE = 0.02


@dataclasses.dataclass(frozen=True)
class Scene:
    """One layer on one rank.

    Attributes:
        layer: layer of the student, 0-based.
        tp_rank, cp_rank: the rank whose shapes are used.
        fa_heads, gdn_heads: number of heads of each kind on this rank in this layer.
        shape: all that distinguishes this layer's kernels from those of other layers of the model.
    """

    layer: int
    tp_rank: int
    cp_rank: int
    fa_heads: int
    gdn_heads: int
    shape: tuple[int, ...]

    def __str__(self) -> str:
        text = f"{self.fa_heads} FA and {self.gdn_heads} GDN heads"
        if self.cp_rank:
            text += f", context rank {self.cp_rank}"
        return text


def scenes(config: RunConfig, model: ModelConfig) -> list[Scene]:
    """Every combination of heads on any rank in any layer, the most GDN heads first.

    Under context parallelism the first, the second and the last shard are separate scenes: the first has no
    shard before it, and the last has none after it.
    """
    tensor, context = config.parallel.tensor, config.parallel.context
    found: dict[tuple[int, ...], Scene] = {}
    for partition in plan_model(model, tensor, config.parallel.fa_partition):
        for rank in range(tensor):
            heads = LocalHeads(model, partition, rank)
            shape = (
                len(heads.fa), len(heads.replicated_fa), len(heads.gdn), len(set(heads.fa_kv_of_heads)),
                len(set(heads.gdn_kv_of_heads)), heads.in_rows_padded, heads.num_sharded_padded,
                bool(heads.num_fa_here) and model.switches.fa_rotates(partition.layer),
            )  # fmt: skip
            for cp_rank in sorted({0, min(1, context - 1), context - 1}):
                counts = heads.num_fa_here, len(heads.gdn)
                scene = Scene(partition.layer, rank, cp_rank, *counts, (*shape, cp_rank))
                found.setdefault(scene.shape, scene)
    return sorted(found.values(), key=lambda s: (-s.gdn_heads, -s.fa_heads, s.cp_rank))


def streams(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Kind of micro-batch -> boundaries of its documents, for all kinds that the run's data may have.

    ``packed``: two documents in every sequence, whose lengths are not multiples of a chunk. Without padding,
    every sequence can also be one document. FLA then gets the sequences as rows of a batch, and compiles a
    kernel for this number of rows.
    """
    length, sequence = rounded_stream_length(config), config.data.sequence_length
    cut = max(1, sequence // 3) | 1
    starts = range(0, config.batch.micro_batch_size * sequence, sequence)
    edges = {0, length, *starts, *(start + cut for start in starts)}
    found = {"packed documents": tuple(sorted(edge for edge in edges if edge <= length))}
    if length == len(starts) * sequence:
        found["one document a sequence"] = (*starts, length)
    return found


def rehearse(
    config: RunConfig,
    model: ModelConfig,
    teacher: ModelConfig | None,
    scene: Scene,
) -> Iterator[str]:
    """Run a scene; announce each part before it starts.

    Args:
        config: the run. Its pipeline and data parallelism do not change shapes and are ignored.
        model, teacher: as in the run.
    """
    parallel = dataclasses.replace(
        config.parallel, pipeline=1, virtual_pipeline=1, overlap_grad_reduce=False,
        overlap_param_gather=False,
    )  # fmt: skip
    config = dataclasses.replace(config, parallel=parallel)
    rank = scene.tp_rank + parallel.tensor * scene.cp_rank
    gc.collect()  # frees the models of the previous scene, whose hooks form reference cycles
    with postponed(), rehearsed_world(config, rank) as world:
        verb, chunks = _cast(config, world, _one_layer(model, scene.layer), teacher)
        biases = GATE_BIASES if scene.gdn_heads else GATE_BIASES[:1]
        for (name, boundaries), bias in itertools.product(streams(config).items(), biases):
            feed_watchdog()
            yield f"{scene}, {name}"
            _fill(chunks, bias)
            _call(world, verb, chunks, boundaries)


def play(
    config: RunConfig,
    model: ModelConfig,
    teacher: ModelConfig | None,
    scene: Scene,
    note: Callable[[tilelang_kernels.Noted], None],
) -> None:
    """Note TileLang's kernels that a scene and the start-up check ask for, and do not compile them.

    The process must end afterwards (:func:`~megatron_hydra.ops.tilelang_kernels.played`).
    """
    with tilelang_kernels.played(note):
        for _ in rehearse(config, model, teacher, scene):
            pass
        case = kernel_case(model, config)
        call_delta_rules(choose_kernels(config.backend, case, check=False), case)


def check(config: RunConfig, model: ModelConfig, teacher: ModelConfig | None) -> None:
    """Run the start-up check of every kernel that the ranks of the run call.

    Raises:
        HydraError: see :func:`~megatron_hydra.ops.self_check.check_kernels`.
    """
    for of in (teacher, model):
        if of is not None:
            case = kernel_case(of, config)
            check_kernels(choose_kernels(config.backend, case, check=False), case)


def _one_layer(model: ModelConfig, layer: int) -> ModelConfig:
    heads, hydra = model.full_attention_heads, model.hydra
    chosen = None if heads is None else (heads[layer],)
    if hydra is not None:  # as the first of one layer
        hydra = dataclasses.replace(hydra, fa_rotary_every=int(hydra.fa_rotates(layer)))
    return dataclasses.replace(
        model, num_layers=1, full_attention_heads=chosen, head_map=None, hydra=hydra
    )


def _cast(
    config: RunConfig, world: World, model: ModelConfig, teacher: ModelConfig | None
) -> tuple[Verb, list[torch.nn.Module]]:
    teachers: list[GPTModel] = []
    if teacher is not None:
        teachers = freeze(build_chunks(_one_layer(teacher, 0), config))
        _fill(teachers, 0.0)
    verb = VERBS[config.verb](config, world, teachers)
    return verb, list(wrap_for_training(build_chunks(model, config), verb, config))


@torch.no_grad()
def _fill(chunks: list[torch.nn.Module] | list[GPTModel], gate_bias: float) -> None:
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith("dt_bias"):
                parameter.fill_(gate_bias)
            elif name.endswith("A_log"):
                parameter.zero_()
            else:
                parameter.normal_(std=_WEIGHT_SCALE)


def _call(
    world: World,
    verb: Verb,
    chunks: list[torch.nn.Module],
    boundaries: tuple[int, ...],
) -> None:
    """One micro-batch, forward and backward."""
    length = boundaries[-1]
    tokens = torch.zeros(length, dtype=torch.int64)
    batch = PackedBatch(tokens, tokens, torch.ones(length), boundaries)
    for chunk in chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    local = local_batch(batch, world, length)
    run_micro_batches(
        verb,
        chunks,
        [iter([local]) for _ in chunks],
        1,
        forward_only=verb.backward_inside_forward,
    )
