#!/usr/bin/env python3
"""Profile of a training step: kernels by group, launches, the host against the device.

The steps are the trainer's own (batch to the device, forward, backward, gradient norm, AdamW update) with
random weights, on packed documents that are new in every step, as in training. First some steps are timed
without a profiler, then a few are recorded: the table's seconds per step are with the profiler, its tokens/s
are without. Then one step runs with torch's warnings of host synchronisations, and the stack of each place that
waits for the device is listed.

A kernel belongs to the first group whose pattern matches its name. "elementwise" are torch's remaining
pointwise kernels, "other" are kernels that no pattern matches.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import itertools
import json
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _harness as harness
from benchmarks import _models as models
from benchmarks.step import build_train_state
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import (
    BatchConfig,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
)
from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.data.packing import pack_documents
from megatron_hydra.errors import HydraError, command
from megatron_hydra.parallel.world import start_world, stop_world
from megatron_hydra.training.flops import attention_pairs, peak_tflops, step_flops
from megatron_hydra.training.observe import PhaseTimers
from megatron_hydra.training.step import StepResult, TrainState, train_step

EXAMPLE = "python -m benchmarks.step_profile --verbs align,distill --output profile"

GROUPS: tuple[tuple[str, str], ...] = (
    ("NCCL", "nccl"),
    ("copies, fills", "memcpy|memset|copy_kernel|FillFunctor|CatArrayBatched|bfloat16_copy"),
    ("optimizer", "adam|multi_tensor|foreach"),
    ("attention", "flash|fmha|sdpa|cudnn.*attn|cudnn_generated|_bprop_|fprop_|attention"),
    (
        "GDN",
        "chunk|gdn|delta|kkt|wy_|fwd_h|dhu|solve_tril|cumsum|main_kernel|tilelang|w_u|prepare_h",
    ),
    ("loss", "_statistics_kernel|_gradient_kernel"),
    ("matmul", "gemm|cublas|cutlass|nvjet|splitK|xmma"),
    ("norms", "rms_norm|layer_norm|LayerNorm|RMSNorm|GammaBeta"),
    ("embedding, indexing", "embedding|index|sort|radix|krn_partial|compute_grad_weight"),
    ("reductions", "reduce"),
    ("elementwise", "elementwise|triton_poi|triton_red|triton_per|pointwise|softmax"),
)
"""Groups and their patterns of names."""

OUR_OPS = {
    "_FusionTail": "our kernels: fusion tail",
    "_PrepareHeads": "our kernels: q/k preparation",
    "_DeltaRuleInputs": "our kernels: q, k and v of the delta rule",
    "_DeltaRuleGates": "our kernels: gates of the delta rule",
    "_ShortConv": "our kernels: short convolution",
    "_LinearDistillationLoss": "loss",
}
"""Part of an autograd node's name -> group: all our kernels have one of the two names below."""


def packed_batches(
    config: RunConfig, vocabulary: int, equal: bool, seed: int
) -> Iterator[PackedBatch]:
    """Micro-batches of random tokens for ever.

    Args:
        equal: whether every document fills its sequence. Otherwise lengths are log-normal (the median is the
            sequence length, the spread a factor of e) and packed by ``data.packing``.
    """
    length, count = config.data.sequence_length, config.batch.micro_batch_size
    rng = np.random.default_rng(seed)
    number = 0
    while True:
        pieces = [[length]] * count
        if not equal:
            documents = np.maximum(1, rng.lognormal(np.log(length), 1.0, 2 * count)).astype(
                np.int64
            )
            offsets = np.cumsum(documents) - documents
            packs = pack_documents(
                offsets, documents, length, config.data.packing, number, "random"
            )
            drawn = rng.permutation(len(packs))[:count].tolist()  # packs are sorted by their fill
            pieces = [[size for _, size in packs.pieces(pack)] for pack in drawn]
        sizes = [size for pack in pieces for size in (*pack, length - sum(pack)) if size]
        tokens = torch.from_numpy(rng.integers(vocabulary, size=count * length + 1))
        boundaries = (0, *np.cumsum(sizes).tolist())
        mask = torch.ones(count * length)
        mask[torch.tensor(boundaries[1:]) - 1] = 0
        yield PackedBatch(tokens[:-1], tokens[1:], mask, boundaries, (number,))
        number += 1


def profiled_config(args: argparse.Namespace, verb: str, device: torch.device) -> RunConfig:
    """The run to profile."""
    config = models.run_config(device)
    return dataclasses.replace(
        config,
        verb=verb,  # type: ignore[arg-type]
        data=DataConfig(sequence_length=args.length, packing="split_long"),
        batch=BatchConfig(args.documents, args.documents),
        optimizer=OptimizerConfig(lr=1e-5),
        loss=LossConfig(kl_weight=0.9, chunk_tokens=args.chunk),
        backend=dataclasses.replace(config.backend, streams=args.streams),
    )


class Trace:
    """The figures of a recording, for each step.

    Args:
        events: of a Chrome trace.
        steps: steps that were recorded.
        seconds: wall time of all steps.
    """

    def __init__(self, events: list[dict[str, Any]], steps: int, seconds: float) -> None:
        self.steps, self.seconds = steps, seconds / steps
        timed = [event for event in events if "dur" in event]
        self._device = [
            event for event in timed if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        ]
        self._operations = [event for event in timed if event.get("cat") == "cpu_op"]
        self._runtime = [
            event for event in timed if event.get("cat") in ("cuda_runtime", "cuda_driver")
        ]
        self._launched_by = self._launchers()

    def _launchers(self) -> dict[int, list[str]]:
        """Correlation of a launch -> the operations around it on its thread, outermost first."""
        launches = collections.defaultdict(list)
        for event in self._runtime:
            launches[event["tid"]].append(
                (event["ts"], 1, event.get("args", {}).get("correlation"), event)
            )
        for event in self._operations:
            launches[event["tid"]].append((event["ts"], 0, event["dur"], event))
        around: dict[int, list[str]] = {}
        for entries in launches.values():
            entries.sort(key=lambda entry: entry[:2])
            open_operations: list[tuple[float, str]] = []
            for start, is_launch, value, event in entries:
                while open_operations and open_operations[-1][0] < start:
                    open_operations.pop()
                if is_launch:
                    around[value] = [name for _, name in open_operations]
                else:
                    open_operations.append((start + value, event["name"]))
        return around

    def group(self, event: dict[str, Any]) -> str:
        """The group of a kernel, a copy or a fill."""
        operations = self._launched_by.get(event.get("args", {}).get("correlation"), [])
        name = event["name"]
        if name in ("_forward_kernel", "_backward_kernel"):
            for operation in reversed(operations):
                for part, group in OUR_OPS.items():
                    if part in operation:
                        return group
        for group, pattern in GROUPS:
            if re.search(pattern, name, re.IGNORECASE):
                return group
        return "other"

    def by_group(self) -> dict[str, tuple[float, float]]:
        """Seconds and launches per step by group, the largest first."""
        return self._summed(self.group)

    def by_kernel(self) -> dict[str, tuple[float, float]]:
        """Seconds and launches by kernel and the operation that launched it."""

        def named(event: dict[str, Any]) -> str:
            operations = self._launched_by.get(event.get("args", {}).get("correlation"), [])
            evaluated = [n for n in operations if not n.startswith("autograd::engine")]
            return f"{event['name'][:90]} < {' < '.join(reversed(evaluated[-2:]))}"

        return self._summed(named)

    def by_operation(self) -> dict[str, tuple[float, float]]:
        """Host seconds of operations (without the operations inside them), and their number."""
        by_thread = collections.defaultdict(list)
        for event in (*self._operations, *self._runtime):
            by_thread[event["tid"]].append(event)
        totals: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
        for events in by_thread.values():
            events.sort(key=lambda event: (event["ts"], -event["dur"]))
            open_events: list[tuple[float, str]] = []
            for event in events:
                while open_events and open_events[-1][0] <= event["ts"]:
                    open_events.pop()
                if open_events:
                    totals[open_events[-1][1]][0] -= event["dur"]
                totals[event["name"]][0] += event["dur"]
                totals[event["name"]][1] += 1
                open_events.append((event["ts"] + event["dur"], event["name"]))
        return self._sorted(totals)

    def busy_seconds(self) -> float:
        """Seconds per step in which at least one stream of the device works."""
        busy, until = 0.0, -1.0
        for event in sorted(self._device, key=lambda event: event["ts"]):
            start, end = event["ts"], event["ts"] + event["dur"]
            busy += max(0.0, end - max(start, until))
            until = max(until, end)
        return busy * 1e-6 / self.steps

    def waited_seconds(self) -> float:
        """Seconds per step in which the host waits for the device."""
        waits = ("Synchronize", "cudaMemcpy")
        own = [event["dur"] for event in self._runtime if any(w in event["name"] for w in waits)]
        return float(sum(own)) * 1e-6 / self.steps

    def launches(self) -> float:
        """Kernels, copies and fills per step."""
        return len(self._device) / self.steps

    def _summed(self, key: Any) -> dict[str, tuple[float, float]]:
        totals: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
        for event in self._device:
            total = totals[key(event)]
            total[0] += event["dur"]
            total[1] += 1
        return self._sorted(totals)

    def _sorted(self, totals: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
        pairs = ((n, (t * 1e-6 / self.steps, c / self.steps)) for n, (t, c) in totals.items())
        return dict(sorted(pairs, key=lambda pair: -pair[1][0]))


def recorded(steps: Iterator[Any], count: int, device: torch.device) -> Trace:
    """Run ``count`` steps under torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as recording:
        start = time.perf_counter()
        for _ in range(count):
            next(steps)
        _synchronize(device)
        seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recording.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return Trace(events, count, seconds)


def waits_of_a_step(steps: Iterator[Any]) -> dict[str, int]:
    """Stacks (innermost frames of this project and of its libraries) in which the host waits for the device,
    and how often in one step.
    """
    found: collections.Counter[str] = collections.Counter()

    def note(message: Any, *_args: Any, **_kwargs: Any) -> None:
        if "synchroniz" in str(message):
            frames = [
                f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} {frame.name}"
                for frame in traceback.extract_stack()[:-1]
                if "warnings.py" not in frame.filename
            ]
            found[" < ".join(reversed(frames[-6:]))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            next(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(found.most_common())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def training_steps(
    train_state: TrainState, batches: Iterator[PackedBatch]
) -> Iterator[tuple[PackedBatch, StepResult]]:
    """Run a step for every batch; yields the batch and the step's result."""
    timers = PhaseTimers()
    for batch in batches:
        result = train_step(train_state, [batch], lambda: (False, False), timers)
        if result.fault:
            raise HydraError(f"a step on random weights went wrong: {result}")
        yield batch, result


def profile_verb(
    report: harness.Report, args: argparse.Namespace, verb: str, model: ModelConfig,
    teacher: ModelConfig, device: torch.device,
) -> str:  # fmt: skip
    """Time and record steps of one verb; returns the text of its tables."""
    config = profiled_config(args, verb, device)
    models.compile_kernels(config, model, teacher)
    world = start_world(config)
    try:
        train_state = build_train_state(model, teacher, config, world)
        endless = packed_batches(config, model.vocab_size, args.equal, args.seed)
        # Batches are made before: a run reads them in advance in another thread.
        batches = list(itertools.islice(endless, args.warmup + args.repeats + args.steps + 1))
        steps = training_steps(train_state, iter(batches))
        for _ in range(args.warmup):
            next(steps)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        sample = harness.Sample()
        flops, tokens = 0.0, args.documents * args.length
        for _ in range(args.repeats):
            start, cpu = time.perf_counter(), time.process_time()
            batch, _ = next(steps)
            _synchronize(device)
            sample.wall.append(time.perf_counter() - start)
            sample.cpu.append(time.process_time() - cpu)
            pairs = attention_pairs([batch])
            flops += step_flops(config.verb, model, teacher, tokens, pairs) / args.repeats
        if device.type == "cuda":
            sample.peak_bytes = torch.cuda.max_memory_allocated()
        report.add(tokens, {verb: sample})
        peak = peak_tflops(torch.cuda.get_device_name()) if device.type == "cuda" else 0.0
        share = f", {flops / sample.median / 1e12 / peak:.1%} of the peak" if peak else ""
        report.note(f"{verb}: {tokens / sample.median:,.0f} tokens/s{share}")
        trace = recorded(steps, args.steps, device)
        waits = waits_of_a_step(steps) if device.type == "cuda" else {}
    finally:
        stop_world()
    report.ran(**models.used_kernels(config, model, device))
    return as_text(verb, trace, waits, args.rows)


def as_text(verb: str, trace: Trace, waits: dict[str, int], rows: int) -> str:
    """The tables of one verb."""
    busy, waited = trace.busy_seconds(), trace.waited_seconds()
    lines = [
        f"== {verb}, per step of {trace.steps} recorded ones ==",
        f"wall {1e3 * trace.seconds:.1f} ms; device busy {1e3 * busy:.1f} ms, idle "
        f"{1e3 * (trace.seconds - busy):.1f} ms; host waits for it {1e3 * waited:.1f} ms; "
        f"{trace.launches():.0f} kernels, copies and fills",
    ]
    tables = (
        ("device time by group", trace.by_group(), None),
        ("device time by kernel < the operations that launched it", trace.by_kernel(), rows),
        ("host time by operation, without those inside it", trace.by_operation(), rows),
    )
    for title, table, limit in tables:
        lines += ["", f"{title}", f"{'ms':>9} {'number':>8}"]
        for name, (seconds, count) in list(table.items())[:limit]:
            lines.append(f"{1e3 * seconds:9.3f} {count:8.1f}  {name}")
    lines += ["", f"waits of the host for the device in one step: {sum(waits.values())}"]
    lines += [f"{count:5d}  {stack}" for stack, count in waits.items()]
    return "\n".join(lines) + "\n"


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE)
    parser.add_argument("--verbs", default="align,distill", help="comma-separated (default both)")
    parser.add_argument("--documents", type=int, default=128,
                        help="sequences of a micro-batch (default 128)")  # fmt: skip
    parser.add_argument("--length", type=int, default=512, help="of a sequence (default 512)")
    parser.add_argument("--chunk", type=int, default=4096, help="loss.chunk_tokens (default 4096)")
    parser.add_argument("--equal", action="store_true", help="every document fills its sequence")
    parser.add_argument("--layers", type=int, help="fewer layers than the model's 30")
    parser.add_argument("--streams", choices=("auto", "one", "two"), default="auto")
    parser.add_argument("--steps", type=int, default=2, help="recorded steps (default 2)")
    parser.add_argument("--rows", type=int, default=50, help="of each table (default 50)")
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to try the script out")
    parser.set_defaults(repeats=8, warmup=5)
    args = parser.parse_args(arguments)
    device = harness.chosen_device(args)
    shape = models.TINY if args.tiny else models.SMOLLM2_135M
    student = models.hybrid_at_ratio(shape)
    if args.layers:
        shape, student = models.smaller(shape, args.layers), models.smaller(student, args.layers)
    report = harness.Report("step_profile", args, device)
    report.note(
        f"{shape.num_layers} layers, hidden {shape.hidden_size}, {args.documents} x {args.length} tokens"
    )
    for verb in args.verbs.split(","):
        text = profile_verb(report, args, verb, student, shape, device)
        print(text, flush=True)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / f"step_profile_{verb}.txt").write_text(text)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
