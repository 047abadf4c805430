"""Worker: run a real training step and print its peak memory and what it computed.

``python -m tests.planning.measure CASES.json`` (under torchrun for several ranks) prints one JSON line for each
case. For every rank it has the bytes before a step, the peak bytes of the second step, the FLOPs of matrix
products, and the number of operators that compute. On a CPU, bytes count every allocation and release of
torch's allocator, so temporaries inside operators are included. On a GPU they are the caching allocator's.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from megatron_hydra.config.loading import from_dict
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.config.validate import rounded_stream_length
from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.parallel import platform
from megatron_hydra.parallel.world import World, start_world, stop_world
from megatron_hydra.training.faults import FaultTracker
from megatron_hydra.training.observe import PhaseTimers
from megatron_hydra.training.setup import build_chunks, build_optimizer, freeze, wrap_for_training
from megatron_hydra.training.step import TrainState, _accumulate_gradients, train_step
from megatron_hydra.transfer.verbs import VERBS

_ATEN = torch.ops.aten


def _solve_flops(matrix: Any, right: Any, *_: Any, **__: Any) -> int:
    """FLOPs of a triangular system: a multiplication and an addition for half of the square."""
    return math.prod(matrix) * right[-1]


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


NOT_COUNTED_BY_TORCH = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    _ATEN.linalg_solve_triangular: _solve_flops,
}
"""Formulas that torch's counter lacks: CPU attention and the triangular solve. CPU attention gets the formulas
of GPU attention, which count every pair of the square, masked or not."""


def _filled(chunks: list[Any]) -> list[Any]:
    """Models with small random weights; their results do not matter here."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.normal_(std=0.02)
    return chunks


def _train_state(config: RunConfig, model: ModelConfig, world: World) -> TrainState:
    teacher = []
    if config.teacher.checkpoint:
        teacher = freeze(_filled(build_chunks(model.dense(), config)))
    verb = VERBS[config.verb](config, world, teacher)
    chunks = wrap_for_training(_filled(build_chunks(model, config)), verb, config)
    optimizer = build_optimizer(chunks, config)
    return TrainState(config, world, verb, chunks, optimizer, FaultTracker(config.faults))


def _batches(config: RunConfig, model: ModelConfig, world: World) -> list[PackedBatch]:
    length = rounded_stream_length(config)
    step = config.data.sequence_length
    count = config.batch.global_batch_size // (config.batch.micro_batch_size * world.dp_size)
    edges = (*range(0, config.batch.micro_batch_size * step, step), length)
    return [
        PackedBatch(
            tokens=torch.randint(0, model.vocab_size, (length,)),
            labels=torch.randint(0, model.vocab_size, (length,)),
            loss_mask=torch.ones(length),
            cu_seqlens=edges,
            sample_ids=(0,),
        )
        for _ in range(count)
    ]


class CpuBytes:
    """Bytes that torch's CPU allocator has allocated within the block."""

    def __enter__(self) -> CpuBytes:
        self._profiler = torch.autograd.profiler.profile(profile_memory=True)
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profiler.__exit__(*error)
        changes, waiting = [], list(self._profiler.kineto_results.experimental_event_tree())
        while waiting:
            event = waiting.pop()
            waiting += event.children
            fields = event.extra_fields
            if hasattr(fields, "alloc_size"):
                changes.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        self.changes = sorted(changes, key=lambda change: change[0])

    def series(self) -> list[tuple[int, int]]:
        """The time of every change, and the live bytes after it.

        Releases by gloo's threads are not reported. They appear when the address is allocated again.
        """
        alive: dict[int, int] = {}
        total, out = 0, []
        for when, address, change in self.changes:
            total -= alive.pop(address, 0)
            if change > 0:
                alive[address] = change
                total += change
            out.append((when, total))
        return out


_NOTHING_COMPUTED = (
    "alias", "chunk", "detach", "empty", "expand", "is_same_size", "lift_fresh", "_local_scalar_dense",
    "new_empty", "_reshape_alias", "resize", "set_", "split", "unbind", "unsafe_split", "_unsafe_view",
)  # fmt: skip
"""Prefixes of operators that, like views, neither read nor write numbers."""


class Operators(TorchDispatchMode):
    """Counts operators that compute, with collectives: on a GPU each launches at least one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        schema = function._schema
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        name = schema.name.split("::")[1]
        self.count += not is_view and not name.startswith(_NOTHING_COMPUTED)
        return function(*args, **(kwargs or {}))


def measure(config: RunConfig, model: ModelConfig) -> dict[str, Any]:
    """On this rank: peak bytes of the second step, bytes between steps, and FLOPs."""
    world = start_world(config)
    try:
        torch.manual_seed(0)
        result = (
            _on_gpu(config, model, world) if platform.has_gpu() else _on_cpu(config, model, world)
        )
        result["rank"] = world.rank
        return result
    finally:
        stop_world()


def _stepper(
    config: RunConfig, model: ModelConfig, world: World
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A whole step, and one without the update."""
    train_state = _train_state(config, model, world)
    batches = _batches(config, model, world)

    def step() -> None:
        train_step(train_state, batches, lambda: (False, False), PhaseTimers())

    return step, lambda: _accumulate_gradients(train_state, batches)


def _on_cpu(config: RunConfig, model: ModelConfig, world: World) -> dict[str, Any]:
    gc.collect()
    gc.disable()
    marks = []
    with CpuBytes() as memory:
        step, gradients = _stepper(config, model, world)
        step()
        gc.collect()
        marks.append(time.time_ns())
        step()
        marks.append(time.time_ns())
    gc.enable()
    series = memory.series()
    held = [total for when, total in series if when < marks[0]][-1]
    peak = max(total for when, total in series if when >= marks[0])
    with FlopCounterMode(display=False, custom_mapping=NOT_COUNTED_BY_TORCH) as counter:
        step()
    with Operators() as operators:
        gradients()
    flops = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    return {
        "held": held, "peak": peak, "flops": sum(flops.values()), "flops_by_op": flops,
        "operators": operators.count,
    }  # fmt: skip


def _on_gpu(config: RunConfig, model: ModelConfig, world: World) -> dict[str, Any]:
    step, _ = _stepper(config, model, world)
    for _ in range(3):
        step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        step()
    end.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return {
        "held": held, "peak": peak, "seconds": start.elapsed_time(end) / 3e3,
        "device": torch.cuda.get_device_name(),
    }  # fmt: skip


def main() -> None:
    """Measure every case of a file and print the ranks' results."""
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    if "RANK" in os.environ:  # one group for all cases
        dist.init_process_group(platform.communication_backend())
    for case in cases:
        config = from_dict(RunConfig, case["run"])
        result = measure(config, from_dict(ModelConfig, case["model"]))
        print(json.dumps({"name": case["name"], **result}), flush=True)
        gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
