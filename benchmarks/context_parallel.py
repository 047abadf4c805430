#!/usr/bin/env python3
"""Two context-parallel processes against one, forward and backward, every process with one thread.

The model is a small hybrid with a long sequence; the two processes hold half of it each. Both
layouts run in turns, each in its own processes, which stay alive: a round is one batch of steps of
the one, then of the other, while the first waits at a barrier that does not spin.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import IO

from benchmarks import _harness as harness
from megatron_hydra.errors import HydraError, command

EXAMPLE = "python -m benchmarks.context_parallel --device cpu --sizes 16K --repeats 7"


class Group:
    """The processes of one layout: told to run steps, they answer with seconds."""

    def __init__(self, ranks: int, tokens: int, args: argparse.Namespace, port: int) -> None:
        self.processes: list[subprocess.Popen] = []
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
        """Seconds of one step, of the slowest process."""
        for process in self.processes:
            _pipe(process.stdin).write("step\n")
            _pipe(process.stdin).flush()
        return max(json.loads(self._answer(process)) for process in self.processes)

    def _answer(self, process: subprocess.Popen) -> str:
        for line in _pipe(process.stdout):
            if line.startswith("seconds "):
                return line.removeprefix("seconds ")
        raise HydraError(f"a worker process ended with status {process.wait()}; its error is above")

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            _pipe(process.stdin).close()
        for process in self.processes:
            process.wait(timeout=60)


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def work(args: argparse.Namespace) -> int:
    """One process: a step whenever a line comes in."""
    import dataclasses

    import torch
    import torch.distributed as dist

    from benchmarks import _models as models
    from megatron_hydra.config.run import ParallelConfig
    from megatron_hydra.model.forward import final_hidden_states
    from megatron_hydra.model.layer_spec import build_gpt_model
    from megatron_hydra.parallel.packed_sequence import PackedSequence
    from megatron_hydra.parallel.world import start_world, stop_world

    torch.set_num_threads(1)
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
        final_hidden_states(gpt, local, packed).square().mean().backward()
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
    device = harness.chosen_device(args)
    if device.type != "cpu":
        raise HydraError("context_parallel measures CPU processes: give --device cpu")
    ratios = {"speed-up of two processes over one": ("one process", "two processes")}
    report = harness.Report("context_parallel", args, device, ratios)
    report.note(f"{args.layers} layers, hidden {args.hidden}, 1 FA : 7 GDN heads, one thread each")
    for tokens in args.sizes:
        groups = {
            "one process": Group(1, tokens, args, _free_port()),
            "two processes": Group(2, tokens, args, _free_port()),
        }
        try:
            samples = {name: harness.Sample() for name in groups}
            for turn in range(args.warmup + args.repeats):
                for name, group in groups.items():
                    seconds = group.step()
                    if turn >= args.warmup:
                        samples[name].wall.append(seconds)
        finally:
            for group in groups.values():
                group.close()
        report.add(tokens, samples)
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
