#!/usr/bin/env python3
"""Whole training steps on one device: the hybrid against the dense model of the same shape.

A step is the trainer's own step of stage 3 (forward, backward, gradient norm, AdamW update) on one sequence of
the given length, with random tokens and weights. The two models are built one after the other, because both
optimizer states rarely fit together. ``--recompute`` selects what the backward recomputes: none, mlp,
attention, attention+mlp or full. With several values, each model takes the first that fits; the ratio names
them, because models with different values are not comparable. With fewer ``--layers`` than the model's, the
rows say so, and no ratio describes the whole model. On a GPU, kernels are first compiled and tuned as training
does it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc

import torch

from benchmarks import _harness as harness
from benchmarks import _models as models
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.errors import command
from megatron_hydra.parallel.world import World, start_world, stop_world
from megatron_hydra.training.faults import FaultTracker
from megatron_hydra.training.observe import PhaseTimers
from megatron_hydra.training.setup import build_chunks, build_optimizer, freeze, wrap_for_training
from megatron_hydra.training.step import TrainState, train_step
from megatron_hydra.transfer.verbs import VERBS

EXAMPLE = "python -m benchmarks.step --sizes 8K,32K,128K --recompute none,mlp,full"


def random_batch(tokens: int, vocabulary: int, seed: int) -> PackedBatch:
    """One document of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(vocabulary, (tokens + 1,), generator=generator)
    return PackedBatch(stream[:-1], stream[1:], torch.ones(tokens), (0, tokens), (0,))


def build_train_state(
    model: ModelConfig, teacher: ModelConfig, config: RunConfig, world: World
) -> TrainState:
    """A model with random weights, its optimizer and its verb."""
    frozen = []
    if VERBS[config.verb].uses_teacher:
        frozen = freeze(build_chunks(teacher, config))
        for chunk in frozen:
            models.randomise(chunk, seed=1)
    verb = VERBS[config.verb](config, world, frozen)
    chunks = build_chunks(model, config)
    for chunk in chunks:
        models.randomise(chunk)
    wrapped = wrap_for_training(chunks, verb, config)
    optimizer = build_optimizer(wrapped, config)
    return TrainState(config, world, verb, wrapped, optimizer, FaultTracker(config.faults))


def timed_steps(
    model: ModelConfig,
    teacher: ModelConfig,
    tokens: int,
    recompute: str,
    world: World,
    args: argparse.Namespace,
    device: torch.device,
) -> harness.Sample:
    """Timings of one model's steps; ``peak_bytes`` is everything: weights, optimizer, activations."""
    config = models.run_config(device, tokens, recompute)
    backend = dataclasses.replace(config.backend, streams=args.streams)
    config = dataclasses.replace(config, verb=args.verb, backend=backend)
    models.compile_kernels(config, model, teacher)
    try:
        train_state = build_train_state(model, teacher, config, world)
        batch = random_batch(tokens, model.vocab_size, args.seed)
        timers = PhaseTimers()

        def peer() -> None:
            result = train_step(train_state, [batch], lambda: (False, False), timers)
            assert not result.fault, result

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        sample = harness.time_in_turns({"": peer}, device, args.repeats, args.warmup)[""]
        if device.type == "cuda" and not sample.failure:
            sample.peak_bytes = torch.cuda.max_memory_allocated()
        if args.profile and device.type == "cuda" and args.output and not sample.failure:
            text = harness.profile(peer, f"{tokens} tokens, {recompute}", calls=1)
            kind = "hydra" if model.is_hybrid else "dense"
            name = f"step_profile_{kind}_{harness.size_name(tokens)}.txt"
            (args.output / name).write_text(text)
    except torch.OutOfMemoryError:
        sample = harness.Sample()
        sample.failure = "OOM"
    train_state = peer = None  # type: ignore[assignment]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return sample


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE, sizes="8K,32K,128K", what="tokens")
    parser.add_argument("--verb", choices=sorted(VERBS), default="finetune")
    parser.add_argument("--recompute", default="none,mlp,full",
                        help="settings to try in this order (default none,mlp,full)")  # fmt: skip
    parser.add_argument("--layers", type=int, help="fewer layers than the model's 28")
    parser.add_argument("--models", default="dense,hydra", help="default dense,hydra")
    parser.add_argument("--streams", choices=("auto", "one", "two"), default="auto",
                        help="backend.streams: branches side by side (auto, two) or not")  # fmt: skip
    parser.add_argument("--profile", action="store_true",
                        help="write tables of kernel times into --output")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to try the script out")
    parser.set_defaults(repeats=3, warmup=1)
    args = parser.parse_args(arguments)
    device = harness.chosen_device(args)
    shape = models.TINY if args.tiny else models.QWEN3_1_7B
    if args.layers:
        shape = models.smaller(shape, args.layers)
    shapes = {"dense": shape, "hydra": models.hybrid(shape, max(1, shape.num_query_heads // 8))}
    chosen = {name: shapes[name] for name in args.models.split(",")}
    report = harness.Report("step", args, device)
    whole = "whole model" if shape.num_layers == 28 else "NOT the whole model"
    report.note(f"{args.verb}, {shape.num_layers} layers ({whole}), hidden {shape.hidden_size}, "
                f"micro-batch 1")  # fmt: skip
    start = models.run_config(device)
    world = start_world(start)
    try:
        for tokens in args.sizes:
            samples: dict[str, harness.Sample] = {}
            settings: dict[str, str] = {}
            for name, model in chosen.items():
                for recompute in args.recompute.split(","):
                    sample = timed_steps(model, shape, tokens, recompute, world, args, device)
                    samples[name], settings[name] = sample, recompute
                    report.add(tokens, {f"{name}, recompute {recompute}": sample})
                    if sample.wall:
                        rate = tokens / sample.median
                        report.note(f"{name}: {rate:,.0f} tokens/s")
                        break
            if {"dense", "hydra"} <= set(samples):
                ratio = harness.Ratio(samples["dense"].wall, samples["hydra"].wall)
                with_settings = f"recompute {settings['hydra']} over {settings['dense']}"
                report.ratio(tokens, f"speed-up of hydra over dense, {with_settings}", ratio)
            report.ran(**models.used_kernels(start, shape, device))
    finally:
        stop_world()
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
