#!/usr/bin/env python3
"""Two context-parallel processes against one process on the same tokens; each process has one thread.

A step is forward, backward and the sum of the gradients over the processes. The model is a small hybrid with a
long sequence; each of the two processes has half of the sequence. Both layouts run in turns, each in its own
processes. They stay alive and wait on a pipe while the other layout works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from typing import IO

from benchmarks import _harness as harness
from megatron_hydra.errors import HydraError, command

EXAMPLE = "python -m benchmarks.context_parallel --sizes 16K --repeats 7"
CLOSING_SECONDS = 20


LAYOUTS = {"one process": 1, "two processes": 2}


class Group:
    """The processes of one layout. They run steps on request and return seconds."""

    def __init__(self, ranks: int, tokens: int, args: argparse.Namespace, port: int) -> None:
        self.processes: list[subprocess.Popen] = []
        try:
            self._start(ranks, tokens, args, port)
        except BaseException:
            self.close()
            raise

    def _start(self, ranks: int, tokens: int, args: argparse.Namespace, port: int) -> None:
        for rank in range(ranks):
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            worker = [sys.executable, "-W", "ignore", "-m", "benchmarks.context_parallel",
                      "--worker", "--sizes", str(tokens), "--layers", str(args.layers),
                      "--hidden", str(args.hidden), "--seed", str(args.seed)]  # fmt: skip
            self.processes.append(
                subprocess.Popen(
                    worker,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def step(self) -> float:
        """Seconds of one step, of the slowest process.

        Raises:
            HydraError: a process has died.
        """
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):  # a missing answer will show it
                _pipe(process.stdin).write("step\n")
                _pipe(process.stdin).flush()
        return max(json.loads(self._answer(process)) for process in self.processes)

    def _answer(self, process: subprocess.Popen) -> str:
        for line in _pipe(process.stdout):
            if line.startswith("seconds "):
                return line.removeprefix("seconds ")
        raise HydraError(f"a worker process ended with status {process.wait()}; its error is above")

    def close(self) -> None:
        """End the processes by closing their input, or by force if one does not answer."""
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):
                _pipe(process.stdin).close()
        for process in self.processes:
            try:
                process.wait(CLOSING_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def work(args: argparse.Namespace) -> int:
    """One process: it runs a step for each input line."""
    import dataclasses

    import torch
    import torch.distributed as dist

    from benchmarks import _models as models
    from megatron_hydra.config.run import ParallelConfig
    from megatron_hydra.model.forward import final_hidden_states
    from megatron_hydra.model.layer_spec import build_gpt_model
    from megatron_hydra.parallel import platform
    from megatron_hydra.parallel.packed_sequence import PackedSequence
    from megatron_hydra.parallel.world import start_world, stop_world

    torch.set_num_threads(1)
    platform.keep_freed_memory()
    size, tokens = int(os.environ["WORLD_SIZE"]), args.sizes[0]
    model = models.hybrid(
        dataclasses.replace(
            models.QWEN3_1_7B, num_layers=args.layers, hidden_size=args.hidden,
            ffn_hidden_size=3 * args.hidden, vocab_size=256, num_query_heads=8, num_kv_heads=4,
            head_dim=args.hidden // 8,
        ),
        1,
    )  # fmt: skip
    run = models.run_config(torch.device("cpu"), tokens)
    run = dataclasses.replace(run, parallel=ParallelConfig(context=size))
    world = start_world(run)
    gpt = build_gpt_model(model, run)
    models.randomise(gpt, args.seed)
    packed = PackedSequence((0, tokens), cp_rank=world.cp_rank, cp_size=size)
    generator = torch.Generator().manual_seed(args.seed)
    stream = torch.randint(256, (tokens,), generator=generator)
    local = stream[world.cp_rank * tokens // size : (world.cp_rank + 1) * tokens // size]
    for _ in sys.stdin:
        dist.barrier()
        begin = time.perf_counter()
        final_hidden_states(gpt, local, packed).square().sum().div(tokens).backward()
        gradients = [p.grad for p in gpt.parameters() if p.grad is not None]
        if size > 1:
            dist.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        dist.barrier()
        seconds = time.perf_counter() - begin
        gpt.zero_grad(set_to_none=True)
        print(f"seconds {seconds}", flush=True)
    stop_world()
    return 0


def _free_port() -> int:
    import socket

    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE, sizes="16K", what="tokens")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        return work(args)
    device = harness.cpu_only(args, "context_parallel")
    ratios = {"speed-up of two processes over one": ("one process", "two processes")}
    report = harness.Report("context_parallel", args, device, ratios)
    report.note(f"{args.layers} layers, hidden {args.hidden}, 1 FA : 7 GDN heads, one thread each")
    for tokens in args.sizes:
        samples = {name: harness.Sample() for name in LAYOUTS}
        with contextlib.ExitStack() as opened:
            groups = {}
            for name, ranks in LAYOUTS.items():
                groups[name] = Group(ranks, tokens, args, _free_port())
                opened.callback(groups[name].close)
            for turn in range(args.warmup + args.repeats):
                for name, group in groups.items():
                    seconds = group.step()
                    if turn >= args.warmup:
                        samples[name].wall.append(seconds)
        report.add(tokens, samples)
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
