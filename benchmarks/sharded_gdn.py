#!/usr/bin/env python3
"""The gated delta rule of one context-parallel rank, forward and backward, against an independent shard.

It times every way to share a sequence: ours with FlashQLA's and with FLA's kernels, FLA's own context
parallelism, and all-to-all over heads. It also times the same shard as an independent sequence, the lower limit
for all.

    python -m benchmarks.sharded_gdn --ranks 4                                  # one GPU plays each rank
    torchrun --nproc-per-node 4 -m benchmarks.sharded_gdn                       # one GPU a rank, NCCL

One GPU plays rank 0, rank 1 and the last rank, one after the other. It computes all that a rank computes;
collectives return at once and move no data. It also times each of our four steps alone. Under torchrun a round
takes as long as its slowest rank, collectives move data, and outputs and gradients are first compared with the
whole stream's. The bytes that a rank sends are counted at its calls of collectives. Kernels that are not
compiled yet take minutes, FLA's own the longest: --skip "FLA's own" leaves them out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks import _harness as harness
from benchmarks._bytes import counted_bytes
from megatron_hydra.errors import HydraError, command
from megatron_hydra.ops.fla_tuning import configurations_compiled_together
from megatron_hydra.ops.gated_delta_rule import chunked_gated_delta_rule
from megatron_hydra.ops.linear_rules import GATED_DELTA_RULE
from megatron_hydra.ops.self_check import TOLERANCE
from megatron_hydra.ops.sharded_delta_rule import (
    RuleKernels,
    ShardKernels,
    ShardsHere,
    sharded_gated_delta_rule,
)
from megatron_hydra.parallel.context_parallel import ShardStates

EXAMPLE = (
    "python -m benchmarks.sharded_gdn --device cpu --sizes 256 --ranks 2 --heads 2 --head-dim 16"
)
ALONE = "independent shard"
ALL_TO_ALL = "all-to-all over heads"
CHECKED_TOKENS = 1024
"""Tokens of a shard whose results are compared."""

Rule = Callable[..., torch.Tensor]
Way = Callable[[torch.Tensor, dist.ProcessGroup], torch.Tensor]


def shard_kernels(device: torch.device) -> dict[str, ShardKernels]:
    """The kernels that can compute a shard here, by name."""
    if device.type == "cpu":
        return {"torch": RuleKernels(chunked_gated_delta_rule)}
    from megatron_hydra.ops.fla_shard_kernels import FlaShardKernels
    from megatron_hydra.ops.flash_qla_shard_kernels import FlashQlaShardKernels

    kernels: dict[str, ShardKernels] = {}
    if importlib.util.find_spec("flash_qla"):
        kernels["FlashQLA"] = FlashQlaShardKernels()
    return {**kernels, "FLA": FlaShardKernels()}


def whole_rule(device: torch.device, flash_qla: bool = True) -> Rule:
    """The rule for a sequence that is not shared: the fastest here, or FLA's own."""
    if device.type == "cpu":
        return lambda *x: chunked_gated_delta_rule(*x)[0]
    from megatron_hydra.ops.fla_delta_rule import fla_gated_delta_rule

    def rule(*inputs: torch.Tensor) -> torch.Tensor:
        os.environ["FLA_FLASH_QLA"] = "1" if flash_qla else "0"
        return fla_gated_delta_rule(*inputs, fla=GATED_DELTA_RULE.fla)[0]

    return rule


class _Exchange(torch.autograd.Function):
    """One direction of the exchange; its gradient goes the other way."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, way: Way, back: Way
    ) -> torch.Tensor:
        ctx.group, ctx.back = group, back
        return way(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.back(grads[0], ctx.group), None, None, None


def _to_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[T_local, H, c]`` → ``[T_global, H / N, c]``: all tokens of this rank's heads."""
    n = group.size()
    sent = x.unflatten(1, (n, -1)).transpose(0, 1).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.flatten(0, 1)


def _to_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The inverse of :func:`_to_heads`."""
    n = group.size()
    sent = x.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.unflatten(0, (n, -1)).transpose(0, 1).flatten(1, 2)


def all_to_all(rule: Rule, group: dist.ProcessGroup) -> Rule:
    """Every rank gets all tokens of its share of the heads, and returns the outputs."""

    def shared(*inputs: torch.Tensor) -> torch.Tensor:
        d = inputs[0].shape[-1]
        qkv = _Exchange.apply(torch.cat(inputs[:3], dim=-1), group, _to_heads, _to_tokens)
        gates = _Exchange.apply(torch.stack(inputs[3:], dim=-1), group, _to_heads, _to_tokens)
        q, k, v = (x.contiguous() for x in qkv.split(d, dim=-1))
        log_alpha, beta = (x.contiguous() for x in gates.unbind(-1))
        output: torch.Tensor = _Exchange.apply(
            rule(q, k, v, log_alpha, beta), group, _to_tokens, _to_heads
        )
        return output

    return shared


def rules(
    device: torch.device, tokens: int, heads: int, group: dist.ProcessGroup
) -> dict[str, Rule]:
    """By name, the rule of this rank's shard of one document of so many tokens."""
    exchange = ShardStates(group, (0, tokens))
    found = {ALONE: whole_rule(device)}
    for name, kernels in shard_kernels(device).items():
        found[f"ours, {name}"] = lambda *x, kernels=kernels: sharded_gated_delta_rule(
            kernels, x, exchange
        )
    if device.type == "cuda":
        from megatron_hydra.ops.fla_delta_rule import fla_own_context_parallel

        found["FLA's own"] = lambda *x: fla_own_context_parallel(
            *x, exchange=exchange, fla=GATED_DELTA_RULE.fla
        )[0]
        found[f"{ALONE}, FLA"] = whole_rule(device, flash_qla=False)
    if heads % group.size() == 0:
        found[ALL_TO_ALL] = all_to_all(whole_rule(device), group)
        if device.type == "cuda":  # FlashQLA cannot compute every number of heads
            found[f"{ALL_TO_ALL}, FLA"] = all_to_all(whole_rule(device, flash_qla=False), group)
    return found


def make_inputs(
    tokens: int, args: argparse.Namespace, decay: float, device: torch.device, seed: int
) -> list[torch.Tensor]:
    """q, k of unit norm, v; log α down to −decay; β in (0, 1)."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (tokens, args.heads, args.head_dim)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal() -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    gates = torch.rand(2, *shape[:2], generator=generator, device=device)
    inputs = [F.normalize(normal(), dim=-1).to(dtype), F.normalize(normal(), dim=-1).to(dtype)]
    inputs += [normal().to(dtype), -decay * gates[0], gates[1]]
    return [x.requires_grad_() for x in inputs]


def step_of(rule: Rule, inputs: list[torch.Tensor], cotangent: torch.Tensor) -> harness.Peer:
    return lambda: torch.autograd.grad(rule(*inputs), inputs, cotangent)


def steps_alone(
    kernels: ShardKernels,
    exchange: ShardStates,
    inputs: list[torch.Tensor],
    cotangent: torch.Tensor,
) -> dict[str, harness.Peer]:
    """Our rule, step by step (``ops/sharded_delta_rule.py``)."""
    (shard,), x = exchange.held, tuple(t.detach() for t in inputs)
    like = x[0].new_empty(x[0].shape[1], x[0].shape[2], x[2].shape[2], dtype=torch.float32)
    shard_map, begun = kernels.shard_map(shard, x)
    (entering,), transitions = exchange.enter([shard_map], like)
    _, saved = kernels.output(shard, x, begun, entering)
    own, partial = kernels.entering_gradient(shard, x, saved, cotangent)
    (leaving,) = exchange.leave([own], transitions, like)
    return {
        "1 map": lambda: kernels.shard_map(shard, x),
        "  scan of the maps": lambda: exchange.enter([shard_map], like),
        "2 output": lambda: kernels.output(shard, x, begun, entering),
        "3 entering gradient": lambda: kernels.entering_gradient(shard, x, saved, cotangent),
        "  scan of the gradients": lambda: exchange.leave([own], transitions, like),
        "4 gradients": lambda: kernels.gradients(shard, x, saved, partial, cotangent, leaving),
    }


def _results(rule: Rule, inputs: list[torch.Tensor], cotangent: torch.Tensor) -> list[torch.Tensor]:
    output = rule(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, cotangent.to(output.dtype))]


def check_agreement(
    args: argparse.Namespace, device: torch.device, ranks: int, group: dist.ProcessGroup | None
) -> None:
    """Compare every rule with the twin, forward and gradients, on a short stream that remembers.

    Args:
        args: the command's.
        device: where rules run.
        ranks: number of shards.
        group: the ranks; ``None``: this process computes all shards, one after the other.

    Raises:
        HydraError: a rule differs; names it.
    """
    tokens = ranks * min(CHECKED_TOKENS, args.sizes[0] // ranks)
    inputs = make_inputs(tokens, args, 1e-3, device, args.seed)
    with torch.no_grad():
        inputs[4] *= 0.05
    # equal on all ranks
    cotangent = make_inputs(tokens, args, 0.0, device, args.seed + 1)[2].detach()
    twin = [x.detach().float().requires_grad_() for x in inputs]
    want = _results(lambda *x: chunked_gated_delta_rule(*x)[0], twin, cotangent)
    part = slice(0, tokens)
    if group is None:
        found = {
            f"ours, {name}": lambda *x, kernels=kernels: sharded_gated_delta_rule(
                kernels, x, ShardsHere((0, tokens), ranks)
            )
            for name, kernels in shard_kernels(device).items()
        }
    else:
        found = rules(device, tokens, args.heads, group)
        found = {name: rule for name, rule in found.items() if ALONE not in name}
        part = slice(group.rank() * tokens // ranks, (group.rank() + 1) * tokens // ranks)
    local = [x.detach()[part].clone().requires_grad_() for x in inputs]
    for name, rule in found.items():
        if name in args.skip:
            continue
        try:
            got = _results(rule, local, cotangent[part])
        except Exception as error:  # the same on all ranks; the table will name it
            print(f"{name}: {type(error).__name__}, not compared", file=sys.stderr)
            continue
        for what, a, b in zip(("output", "q", "k", "v", "log α", "β"), got, want, strict=True):
            b = b[part]
            error = float((a.float() - b).norm() / b.norm())
            if not error < TOLERANCE[inputs[0].dtype]:
                raise HydraError(
                    f"{name} differs from our torch rule by {error:.1e} ({what} or its gradient); "
                    f"--skip {name!r} leaves it out"
                )


def first_calls(
    peers: dict[str, harness.Peer], device: torch.device
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Call every peer once, which compiles what it needs.

    Returns:
        By peer, the seconds and the bytes that this rank sent; and why other peers failed, equal on all ranks.
    """
    facts: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    for name, peer in peers.items():
        begin = time.perf_counter()
        with counted_bytes() as sent:
            try:
                peer()
                _wait(device)
            except Exception as error:
                traceback.print_exception(error)
                failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
                continue
        seconds = time.perf_counter() - begin
        facts[name] = {"first_call_seconds": seconds, "sent_bytes": sent["bytes"]}
    return facts, failures


def timed_together(
    peers: dict[str, harness.Peer], args: argparse.Namespace, device: torch.device
) -> dict[str, harness.Sample]:
    """As :func:`harness.time_in_turns`, but a call takes as long as its slowest rank.

    All ranks make equally many calls.
    """
    samples = {name: harness.Sample() for name in peers}
    for peer in peers.values():
        for _ in range(args.warmup):
            peer()
    for _ in range(args.repeats):
        for name, peer in peers.items():
            dist.barrier()
            _wait(device)
            begin = time.perf_counter()
            for _ in range(args.calls):
                peer()
            _wait(device)
            seconds = torch.tensor((time.perf_counter() - begin) / args.calls, device=device)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            samples[name].wall.append(float(seconds))
    return samples


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def played(rank: int, ranks: int) -> Iterator[dist.ProcessGroup]:
    """A process group in which this process is one of ``ranks`` ranks, and nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def measure(
    report: harness.Report,
    args: argparse.Namespace,
    group: dist.ProcessGroup,
    tokens: int,
    decay: float,
    together: bool,
) -> None:
    """Measure one length and decay on one rank, or on all together."""
    device, rank, ranks = report.device, group.rank(), group.size()
    where = "slowest rank" if together else f"rank {rank}"
    where += f", log α ≥ {-decay:g}"
    inputs = make_inputs(tokens // ranks, args, decay, device, args.seed + rank)
    cotangent = torch.randn_like(inputs[2])
    peers = {
        name: step_of(rule, inputs, cotangent)
        for name, rule in rules(device, tokens, args.heads, group).items()
        if name not in args.skip
    }
    facts, failures = first_calls(peers, device)
    peers = {name: peers[name] for name in facts}
    if together:
        samples = timed_together(peers, args, device)
    else:
        samples = harness.time_in_turns(peers, device, args.repeats, args.warmup)
    for name, failure in failures.items():
        samples[name] = harness.Sample()
        samples[name].failure = failure
    for name, sample in samples.items():
        report.add(
            tokens, {f"{name}, {where}": sample}, rank=where, decay=decay, way=name,
            **facts.get(name, {}),
        )  # fmt: skip
        alone = samples.get(ALONE)
        if ALONE not in name and sample.wall and alone is not None and alone.wall:
            ratio = harness.Ratio(sample.wall, alone.wall)
            report.ratio(tokens, f"time of {name} / {ALONE}, {where}", ratio)
    exchanged = next((name for name in facts if ALL_TO_ALL in name), None)
    if exchanged is not None:
        for name in facts:
            if ALONE not in name and ALL_TO_ALL not in name:
                pair = [[facts[way]["sent_bytes"]] for way in (name, exchanged)]
                report.ratio(
                    tokens, f"bytes sent by {name} / {ALL_TO_ALL}, {where}", harness.Ratio(*pair)
                )
    if not together:
        for name, kernels in shard_kernels(device).items():
            if f"ours, {name}" not in facts:
                continue
            alone = steps_alone(kernels, ShardStates(group, (0, tokens)), inputs, cotangent)
            timed = harness.time_in_turns(alone, device, args.repeats, args.warmup, memory=False)
            report.add(
                tokens,
                {f"{name}: {step}, {where}": sample for step, sample in timed.items()},
                rank=where, decay=decay, way=f"ours, {name}",
            )  # fmt: skip


def run(report: harness.Report, args: argparse.Namespace, ranks: int, together: bool) -> None:
    """Compare all ways with the twin, then measure every length, decay and rank."""
    cases = itertools.product(args.sizes, args.decays)
    if together:
        group = dist.group.WORLD
        assert group is not None
        check_agreement(args, report.device, ranks, group)
        for tokens, decay in cases:
            measure(report, args, group, tokens, decay, together)
        dist.barrier()
        dist.destroy_process_group()
        return
    check_agreement(args, report.device, ranks, None)
    ranks_played = args.play or sorted({0, min(1, ranks - 1), ranks - 1})
    for (tokens, decay), rank in itertools.product(cases, ranks_played):
        with played(rank, ranks) as group:
            measure(report, args, group, tokens, decay, together)


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE, sizes="512K", what="tokens of the whole sequence")
    parser.add_argument("--ranks", type=int, default=4, help="that share it (default 4)")
    parser.add_argument(
        "--play",
        type=harness.sizes_of,
        help="which ranks one GPU plays (default: 0, 1 and the last)",
    )
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--decays", type=_numbers, default=[0.05, 0.0005],
                        help="smallest −log α, comma-separated (default 0.05,0.0005)")  # fmt: skip
    parser.add_argument(
        "--calls", type=int, default=3, help="under torchrun, calls of a sample (default 3)"
    )
    parser.add_argument("--skip", nargs="*", default=[], help="ways to leave out, by name")
    args = parser.parse_args(arguments)
    if args.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = harness.chosen_device(args)
    together = "WORLD_SIZE" in os.environ
    ranks = int(os.environ["WORLD_SIZE"]) if together else args.ranks
    for tokens in args.sizes:
        if tokens % ranks:
            raise HydraError(
                f"--sizes {tokens} is not a multiple of the {ranks} ranks that share it"
            )
    if together:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank():
            args.output, sys.stdout = None, io.StringIO()  # the first rank reports
    report = harness.Report("sharded_gdn", args, device)
    report.note(f"{args.heads} heads, d = {args.head_dim}, {ranks} ranks, forward + backward")
    with configurations_compiled_together(
        max(1, (os.cpu_count() or 1) // (ranks if together else 1))
    ):
        run(report, args, ranks, together)
    if device.type == "cuda":
        report.ran(fla=harness.used_delta_rule("fla"))
    report.finish()
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers") from None


if __name__ == "__main__":
    raise SystemExit(main())
