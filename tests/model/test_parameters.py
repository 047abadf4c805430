"""Every parameter of a layer against recorded hashes: names, shapes, bytes, places, marks.

``recorded_parameters.json`` has hashes of many models: of canonical keys, of the tensors of a new student and
of its export, and of the parameters of every tensor-parallel rank. So checkpoints and exports stay equal to
those of earlier versions. The first command records new models. The second one records all models again; use it
only if a format changes on purpose:

    python -m tests.model.test_parameters
    python -m tests.model.test_parameters again
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.spec_utils import build_module

from megatron_hydra.checkpoint.canonical import canonical_shapes
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.conversion.families import name_map
from megatron_hydra.conversion.student import StudentInit, initialise_student
from megatron_hydra.conversion.teacher_statistics import HeadStatistics
from megatron_hydra.model.layer_spec import hydra_layer_spec, kernel_case, transformer_config
from megatron_hydra.model.local_heads import LocalHeads
from megatron_hydra.ops.backends import choose_kernels
from megatron_hydra.parallel.head_partition import plan_model
from megatron_hydra.parallel.world import rehearsed_world
from megatron_hydra.planning.parameters import layer_parameters
from megatron_hydra.training import setup
from tests.parallel import layouts

RECORDED = Path(__file__).with_name("recorded_parameters.json")
ALL, SOME = tuple(range(8)), (1, 6, 7)
PLAIN = HydraConfig(fusion="concat", fusion_norm="none")

MODELS = layouts.MODELS | {
    "no-fa": layouts.tiny(HydraConfig(), ((), ())),
    "no-gdn": layouts.tiny(HydraConfig(), (ALL, ALL)),
    "no-fa-shared": layouts.tiny(HydraConfig(qkv="shared"), ((), ())),
    "no-gdn-shared": layouts.tiny(HydraConfig(qkv="shared", gdn_kv="gqa"), (ALL, ALL)),
    "fa-gate-only": layouts.tiny(HydraConfig(gdn_gate=False, fa_gate_bias=False), (SOME, (2,))),
    "gdn-gate-only": layouts.tiny(
        HydraConfig(fa_gate=False, short_conv=False), (SOME, (2,)), qkv_bias=True
    ),
    "gate-bias-without-norm": layouts.tiny(HydraConfig(fusion_norm="none"), (SOME, (2,))),
    "concat": layouts.tiny(dataclasses.replace(PLAIN, fusion_norm="rms"), (SOME, (2,))),
    "gated-bias": layouts.tiny(
        HydraConfig(fusion="gated", conv_width=2), (SOME, (2,)), qkv_bias=True, out_bias=True
    ),
    "qwen2": layouts.tiny(
        HydraConfig(), (SOME, (2,)), family="qwen2", qk_norm=False, qkv_bias=True
    ),
    "llama-bias-shared": layouts.tiny(
        HydraConfig(qkv="shared", fusion="gated"),
        (SOME, ()),
        family="llama",
        qk_norm=False,
        qkv_bias=True,
        out_bias=True,
    ),
    "llama-dense": layouts.tiny(None, None, family="llama", qk_norm=False, tie_embeddings=False),
    "token-concat": layouts.tiny(
        HydraConfig(mixer="token", fusion="concat", qkv="shared"), layouts.EVERY
    ),
}
LAYOUTS = {name: layouts.LAYOUTS[name] for name in ("tp2", "tp2-seq", "tp4-sp", "tp4-sp-seq")}
LAYOUTS["tp1"] = dataclasses.replace(LAYOUTS["tp2"], tensor=1)


def _hash(value: Any) -> str:
    """Hash of a JSON value; tensors count by their bytes."""

    def plain(tensor: torch.Tensor) -> list[Any]:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        digest = hashlib.sha256(raw).hexdigest()
        return [str(tensor.dtype), list(tensor.shape), digest]

    return hashlib.sha256(json.dumps(value, default=plain).encode()).hexdigest()[:16]


def _numbers(shape: tuple[int, ...], start: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers with a long period, equal on every machine."""
    count = torch.Size(shape).numel()
    values = (torch.arange(start, start + count, dtype=torch.int64) * 7919 % 1009 - 500) / 256
    return values.view(shape).to(dtype)


def _students(model: ModelConfig) -> dict[str, dict[str, torch.Tensor]]:
    """Canonical tensors of a student, by kind of start; a dense model has only one."""
    dense = {
        key: _numbers(shape, 31 * i, torch.bfloat16)
        for i, (key, shape) in enumerate(canonical_shapes(model.dense()).items())
    }
    if not model.is_hybrid:
        return {"dense": dense}
    shape = (model.num_layers, model.num_query_heads)
    statistics = HeadStatistics(
        half_life=_numbers(shape, 1, torch.float64).abs() + 1.0,
        write=_numbers((*shape, model.hidden_size), 2, torch.float32),
        distance=torch.zeros(shape),
    )
    gamma = _numbers(shape, 3, torch.float32)
    inits = {kind: StudentInit(kind=kind) for kind in ("spread", "decay", "statistics")}
    return {
        kind: dict(
            initialise_student(
                dense, model, gamma, 5, init, statistics if init.is_measured else None
            )
        )
        for kind, init in inits.items()
    }


def _exported(model: ModelConfig, tensors: dict[str, torch.Tensor]) -> list[Any]:
    """The export's tensors in order; checks that each converts back to its canonical tensor."""
    exported = []
    for mapping in name_map(model):
        parts = mapping.form.to_hf(tensors[mapping.canonical])
        assert [tuple(part.shape) for part in parts] == list(mapping.hf.values())
        back = mapping.form.to_canonical(parts, mapping.canonical_shape)
        assert torch.equal(back, tensors[mapping.canonical]), mapping.canonical
        exported += [[*pair] for pair in zip(mapping.hf, parts, strict=True)]
    return exported


def _of_model(model: ModelConfig) -> dict[str, str]:
    students = _students(model)
    return {
        "canonical": _hash([[key, *shape] for key, shape in canonical_shapes(model).items()]),
        **{kind: _hash([[*item] for item in made.items()]) for kind, made in students.items()},
        "export": _hash(_exported(model, next(iter(students.values())))),
    }


# -- what a rank holds ----------------------------------------------------------------------------

_MARKS = ("tensor_model_parallel", "hydra_partial_gradient", "sequence_parallel")


def _shards(entry: Any) -> Iterator[list[Any]]:
    """Canonical key, place and content of each tensor that a parameter stores."""
    built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
    stored = [shard for shard in built if isinstance(shard, ShardedTensor)]
    for shard in stored:
        yield [shard.key, shard.global_shape, shard.global_offset, shard.replica_id, shard.data]
    if isinstance(entry, ShardedTensorFactory):
        merged = entry.merge_fn([shard.data for shard in stored])
        assert merged.shape == entry.data.shape


def _of_layer(layer: torch.nn.Module, prefix: str) -> list[Any]:
    """Every parameter of a rank's attention, without its name in Python.

    Marks are those that the trainer sets: releases of Megatron-Core differ in which they set themselves.
    """
    setup._mark_sharded_weights(layer)
    group = setup.parallel_state.get_data_parallel_group(with_context_parallel=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(_numbers(tuple(parameter.shape), 0, parameter.dtype))
    state = layer.sharded_state_dict(prefix, (), {"dp_cp_group": group})
    groups = setup._param_groups()
    found = []
    for name, parameter in layer.named_parameters():
        own = [
            key.with_name_predicate.name
            for key in groups
            if key.with_name_predicate.fn(parameter, prefix + name)
        ]
        marks = [mark for mark in _MARKS if getattr(parameter, mark, False)]
        shape, dtype = list(parameter.shape), str(parameter.dtype)
        shards = list(_shards(state.pop(prefix + name)))
        described = [[*shard[:-1], _hash(shard[-1])] for shard in shards]
        found.append([described, shape, dtype, marks, own])
    assert not state
    return sorted(found, key=json.dumps)


def _of_ranks(layout: str, models: dict[str, ModelConfig]) -> dict[str, str]:
    """One hash for each model that the layout supports."""
    parallel, found = LAYOUTS[layout], {}
    run = RunConfig(precision="fp32", parallel=parallel)
    for rank in range(parallel.tensor):
        with rehearsed_world(run, rank):
            for name, model in models.items():
                config = transformer_config(model, run)
                kernels = choose_kernels(run.backend, kernel_case(model, run), check=False)
                spec = hydra_layer_spec(model, run, kernels).submodules.self_attention
                of_rank = [
                    _of_layer(
                        build_module(spec, config=config, layer_number=layer + 1),
                        f"decoder.layers.{layer}.self_attention.",
                    )
                    for layer in range(model.num_layers)
                ]
                found.setdefault(name, []).append(of_rank)
    return {name: _hash(ranks) for name, ranks in found.items()}


def _planned(layout: str, model: ModelConfig) -> list[list[int]]:
    """Elements of each layer on each rank, and how many of them are always fp32."""
    tensor, mode = LAYOUTS[layout].tensor, LAYOUTS[layout].fa_partition
    found = []
    for partition in plan_model(model, tensor, mode):
        for rank in range(tensor):
            parameters = layer_parameters(model, LocalHeads(model, partition, rank), tensor)
            wide = sum(p.numel for p in parameters if p.wide)
            found.append([sum(p.numel for p in parameters), wide])
    return found


def _possible(layout: str) -> dict[str, ModelConfig]:
    by_sequence = LAYOUTS[layout].fa_partition == "sequence"
    return {
        name: model
        for name, model in MODELS.items()
        if not (by_sequence and model.switches.mixes_in_every_head)
    }


@functools.cache
def _recorded() -> dict[str, dict[str, str]]:
    recorded = json.loads(RECORDED.read_text())
    missing = MODELS.keys() - recorded.keys()
    assert not missing, f"no record of {missing}: run python -m tests.model.test_parameters"
    return recorded


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_and_exports_are_the_recorded_ones(name: str) -> None:
    found = _of_model(MODELS[name])
    assert found == {key: _recorded()[name][key] for key in found}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(k, marks=pytest.mark.slow) if k.startswith("tp4") else k for k in LAYOUTS],
)
def test_every_rank_holds_and_stores_what_was_recorded(layout: str) -> None:
    models = _possible(layout)
    found = _of_ranks(layout, models)
    assert found == {name: _recorded()[name][layout] for name in models}
    planned = {name: _hash(_planned(layout, model)) for name, model in models.items()}
    assert planned == {name: _recorded()[name][f"planned-{layout}"] for name in models}


def _record(again: bool) -> None:
    recorded = {} if again else json.loads(RECORDED.read_text())
    new = {name: model for name, model in MODELS.items() if name not in recorded}
    recorded |= {name: _of_model(model) for name, model in new.items()}
    for layout in LAYOUTS:
        possible = {name: new[name] for name in _possible(layout) if name in new}
        for name, value in _of_ranks(layout, possible).items():
            recorded[name][layout] = value
            recorded[name][f"planned-{layout}"] = _hash(_planned(layout, new[name]))
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    _record(again=sys.argv[1:] == ["again"])
