#!/usr/bin/env python3
"""What the host does in a training step, without a GPU: kernels and matrix products do nothing.

What is left is Python and torch's dispatch: modules, autograd, hooks, and each launch up to the driver. The
steps are the trainer's own, of stage 3, for the hybrid and the dense model, with Qwen3-1.7B's numbers of heads
and tiny widths, on a few tokens. Models of two depths are timed; a layer's time is the difference of their
forwards and backwards, divided by the difference of their layers. It is CPU time of the process, so other
processes matter less.

Not in it: the driver's own time of a launch, FlashQLA's and FLA's Python (the delta rule is one empty function
here), and a second stream. So these times show which code costs what, and not a GPU's step.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import dataclasses
import io
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks import _harness as harness
from benchmarks import _models as models
from benchmarks.step import build_train_state, random_batch
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.errors import HydraError, command
from megatron_hydra.model import layer_spec, norm
from megatron_hydra.ops import packages
from megatron_hydra.ops.backends import load_triton
from megatron_hydra.ops.kernels import Kernels
from megatron_hydra.parallel.world import World, start_world, stop_world
from megatron_hydra.training import step as training
from megatron_hydra.training.observe import PhaseTimers
from megatron_hydra.training.step import train_step

EXAMPLE = "python -m benchmarks.host --sizes 4,12 --profile 40"
TOKENS = 16
NARROW = {"hidden_size": 64, "ffn_hidden_size": 64, "vocab_size": 128, "head_dim": 32}
"""Widths at which torch's own work on a CPU is small."""


class _Nothing(torch.autograd.Function):
    """Forward and backward of a kernel that leaves its output as it is allocated."""

    @staticmethod
    def forward(ctx: Any, like: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.like = [(x.shape, x.dtype) for x in (like, *inputs)]
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype) for shape, dtype in ctx.like)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


@contextlib.contextmanager
def idle_kernels() -> Iterator[None]:
    """While the block runs, models call a GPU's kernels, and neither these nor matrix products compute.

    Raises:
        HydraError: Triton is not installed.
    """
    if not packages.is_installed("triton"):
        raise HydraError(
            "benchmarks.host reads the code around Triton's launches: pip install triton"
        )
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels = Kernels(
        attention=lambda q, k, v, *others, **options: _Nothing.apply(q, k, v),
        delta_rule=lambda q, k, v, *others, **options: (_Nothing.apply(v, q, k, *others[:2]), None),
        names={"full_attention": "sdpa", "gated_delta_net": "fla", "fused_kernels": "triton"},
        **load_triton(),
    )
    before = driver._active
    with contextlib.ExitStack() as patches:
        for owner, name, value in (
            (layer_spec, "choose_kernels", lambda *given, **options: kernels),
            (norm, "weighted_rms_norm", lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)),
            (torch, "matmul", _product),
            (torch.Tensor, "matmul", _product),
            (JITFunction, "run", lambda self, *args, grid, warmup, **options: None),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        driver.set_active(mock.Mock())
        try:
            yield
        finally:
            driver._active = before


@contextlib.contextmanager
def timed(owner: Any, name: str, spent: list[float]) -> Iterator[None]:
    """While the block runs, append the CPU seconds of every call of a function."""
    run = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        result = run(*args, **options)
        spent.append(time.process_time() - start)
        return result

    with mock.patch.object(owner, name, call):
        yield


def steps_of(model: ModelConfig, world: World) -> Callable[[], None]:
    """A call is one training step without an update: kernels compute nothing, so the step counts as failed."""
    config = dataclasses.replace(models.run_config(torch.device("cpu"), TOKENS), precision="bf16")
    train_state = build_train_state(model, model, config, world)
    batch, timers = random_batch(TOKENS, model.vocab_size, 0), PhaseTimers()

    def step() -> None:
        train_step(train_state, [batch], lambda: (False, False), timers)

    return step


def _profiled(step: Callable[[], None], rows: int) -> str:
    profile, text = cProfile.Profile(), io.StringIO()
    profile.enable()
    for _ in range(10):
        step()
    profile.disable()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(rows)
    return text.getvalue()


def measure(report: harness.Report, args: argparse.Namespace) -> None:
    """Time the steps of all depths in turns, then report a layer's times."""
    world = start_world(models.run_config(torch.device("cpu"), TOKENS))
    try:
        peers: dict[tuple[str, int], Callable[[], None]] = {}
        for layers in args.sizes:
            shape = dataclasses.replace(models.QWEN3_1_7B, num_layers=layers, **NARROW)
            for name, model in (("dense", shape), ("hydra", models.hybrid(shape, 2))):
                peers[name, layers] = steps_of(model, world)
        samples = {peer: harness.Sample() for peer in peers}
        backwards: dict[tuple[str, int], list[float]] = {peer: [] for peer in peers}
        for number in range(args.warmup + args.repeats):
            for peer, step in peers.items():
                both: list[float] = []
                backward: list[float] = []
                start = time.perf_counter()
                with (
                    timed(training, "run_micro_batches", both),
                    timed(torch.autograd, "backward", backward),
                ):
                    step()
                if number >= args.warmup:
                    samples[peer].wall.append(time.perf_counter() - start)
                    samples[peer].cpu.append(sum(both))
                    backwards[peer].append(sum(backward))
        for layers in args.sizes:
            of_depth = {name: samples[name, layers] for name in ("dense", "hydra")}
            report.add(layers, of_depth)
            ratio = harness.Ratio(of_depth["dense"].cpu, of_depth["hydra"].cpu)
            report.ratio(
                layers, "speed-up of hydra over dense, CPU time of forward and backward", ratio
            )
        few, many = min(args.sizes), max(args.sizes)
        cpu_seconds = {peer: sample.cpu for peer, sample in samples.items()}
        for name in ("dense", "hydra"):
            whole, back = (
                statistics.median(
                    (b - a) / (many - few)
                    for a, b in zip(of[name, few], of[name, many], strict=True)
                )
                for of in (cpu_seconds, backwards)
            )
            report.note(
                f"{name}: {1e3 * whole:.2f} ms of the host for a layer, {1e3 * back:.2f} in the backward"
            )
        if args.profile:
            report.note(_profiled(peers["hydra", many], args.profile))
    finally:
        stop_world()


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE, sizes="4,12", what="layers of both depths")
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS",
                        help="also list the functions of the hybrid's step by their own time")  # fmt: skip
    parser.set_defaults(repeats=15, warmup=3)
    args = parser.parse_args(arguments)
    if len(set(args.sizes)) != 2:
        raise HydraError(f"--sizes: two different depths are needed, not {args.sizes}")
    device = harness.cpu_only(args, "host")
    report = harness.Report("host", args, device)
    with idle_kernels():
        measure(report, args)
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
