#!/usr/bin/env python3
"""Time of the paper's scoring at a model's shape, with random weights: receivers, senders, control.

Which heads are receivers depends on the weights, so their number is given (Qwen3-1.7B has about 29 critical
heads). Receivers are in the upper half of the layers. Senders are in the lower half and are the receivers of
the second round. Prompts are random tokens that differ from a random position on; answers have seven tokens.
Under torchrun the processes share the work, as in a selection. A size is the number of tokens of a prompt.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import _harness as harness
from benchmarks import _models as models
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.errors import HydraError, command
from megatron_hydra.ranks import Ranks
from megatron_hydra.selection.cost import DecoderCost, Tokens
from megatron_hydra.selection.effects import EffectEngine, Solved
from megatron_hydra.selection.patching import Head
from megatron_hydra.selection.prompts import PromptPair, make_batches
from megatron_hydra.selection.runner import DecoderRunner, default_tokens_per_batch
from megatron_hydra.selection.work import WorkBench

EXAMPLE = "python -m benchmarks.selection_time --shape qwen3-1.7b --sizes 4K --output runs/bench"
SHAPES = {"qwen3-1.7b": models.QWEN3_1_7B, "smollm2-135m": models.SMOLLM2_135M, "tiny": models.TINY}
ANSWER, WARM_UP_TOKENS = 7, 512
STEPS = ("baseline", "receivers", "senders, round 1", "senders, round 2", "control")


def build_runner(shape: ModelConfig, device: torch.device, dtype: torch.dtype) -> DecoderRunner:
    """A dense model of random weights on the device."""
    config = transformers.AutoConfig.for_model(
        shape.family,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_query_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rope_parameters=dict(shape.rope_parameters),
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=shape.tie_embeddings,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return DecoderRunner(model)


def random_pairs(vocabulary: int, length: int, count: int, seed: int) -> list[PromptPair]:
    """Pairs whose prompts differ in one token at a random depth, with answers of :data:`ANSWER` tokens."""
    generator = random.Random(seed)
    pairs = []
    for _ in range(count):
        clean = [generator.randrange(vocabulary - 1) for _ in range(length - ANSWER)]
        corrupted = list(clean)
        corrupted[generator.randrange(length // 16, len(clean) - 1)] = vocabulary - 1
        tokens = generator.sample(range(vocabulary), 2 * ANSWER)
        answer, wrong = tuple(tokens[:ANSWER]), tuple(tokens[ANSWER:])
        pairs.append(PromptPair(tuple(clean), tuple(corrupted), answer, wrong))
    return pairs


def spread(count: int, layers: range, heads: int) -> list[Head]:
    """Heads that are spread over some layers."""
    return [(layers[i % len(layers)], (3 * i + i // len(layers)) % heads) for i in range(count)]


class Selection:
    """The steps of one capability's scoring, each of which is computed again."""

    def __init__(self, runner: DecoderRunner, args: argparse.Namespace, tokens: int) -> None:
        self.runner, self.args = runner, args
        self.ranks = Ranks()
        self.size = args.tokens_per_batch or default_tokens_per_batch(runner)
        vocabulary = runner.model.config.vocab_size
        self.pairs = random_pairs(vocabulary, tokens, args.pairs, args.seed)
        layers, heads = runner.num_layers, runner.num_heads
        self.receivers = sorted(set(spread(args.receivers, range(layers // 2, layers), heads)))
        self.senders = sorted(set(spread(args.senders, range(layers // 2), heads)))

    def step(self, name: str) -> Callable[[], Any]:
        """A step as a peer of the harness."""
        steps: dict[str, Callable[[EffectEngine, Solved], Any]] = {
            "baseline": lambda engine, _: engine.solve("t", self.pairs, "off"),
            "receivers": lambda engine, solved: engine.receivers("t", solved),
            "senders, round 1": lambda engine, solved: engine.senders(
                "t", solved, 1, self.receivers, []
            ),
            "senders, round 2": lambda engine, solved: engine.senders(
                "t", solved, 2, self.senders, self.receivers
            ),
            "control": self._control,
        }

        def run() -> None:
            bench = WorkBench(self.ranks)
            solved = Solved(self.pairs, list(range(len(self.pairs))), *[torch.zeros(0).numpy()] * 2)
            steps[name](EffectEngine(self.runner, bench, self.size), solved)
            bench.close()

        return run

    def _control(self, engine: EffectEngine, solved: Solved) -> None:
        means = engine.mean_outputs({"t": solved})
        for heads in (self.receivers, self.senders):
            engine.knock_out("t", solved, heads, means)

    def operations(self, name: str) -> float:
        """Costs by the model that estimates the time left."""
        cost, runner = DecoderCost.of(self.runner), self.runner
        counts = [
            {layer: sum(at == layer for at, _ in heads) for layer, _ in heads}
            for heads in (self.receivers, self.senders, [])
        ]
        receivers, senders, none = counts
        newest, older = (receivers, none) if name.endswith("1") else (senders, receivers)
        total = 0.0
        for batch in make_batches(self.pairs, max(1, 2 * self.size // runner.num_heads)):
            tokens = Tokens.of(batch)
            if name == "baseline":
                total += cost.baseline(tokens)
            elif name == "receivers":
                total += cost.receivers(tokens)
            elif name == "control":
                total += 3 * cost.clean_run(tokens)
            else:
                total += cost.streams(tokens) + sum(
                    cost.senders(tokens, layer, runner.num_heads, newest, older)
                    for layer in range(runner.num_layers)
                )
        return total


def timed(step: Callable[[], Any], repeats: int, device: torch.device) -> harness.Sample:
    """A step's seconds. A step takes minutes, so no call warms it up."""
    sample = harness.Sample()
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        sample.wall.append(time.perf_counter() - wall)
        sample.cpu.append(time.process_time() - cpu)
    return sample


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__, EXAMPLE, sizes="4K", what="tokens of a prompt")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-1.7b")
    parser.add_argument("--pairs", type=int, default=40, help="default %(default)s")
    parser.add_argument("--receivers", type=int, default=29, help="default %(default)s")
    parser.add_argument("--senders", type=int, default=20, help="default %(default)s")
    parser.add_argument("--tokens-per-batch", type=int, default=0, help="as of select_heads.py")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], help="default: bf16 on a GPU, else fp32"
    )
    parser.set_defaults(repeats=1)
    return parser


@command
def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if min(args.pairs, args.receivers, args.senders) < 1:
        raise HydraError("--pairs, --receivers and --senders must be at least 1")
    device = harness.chosen_device(args)
    ranks = Ranks()
    if device.type == "cuda":
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    if ranks.rank:  # the first process reports for all
        args.output = None
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    torch.manual_seed(args.seed)
    runner = build_runner(
        SHAPES[args.shape], device, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    )
    ratios = {"a round of senders over receivers": ("senders, round 1", "receivers")}
    report = harness.Report("selection_time", args, device, ratios)
    report.note(
        f"{args.shape}, {dtype}, {args.pairs} pairs, {args.receivers} receivers, {args.senders} senders, "
        f"{ranks.size} processes"
    )
    for tokens in args.sizes:
        warm_up = argparse.Namespace(**{**vars(args), "pairs": ranks.size})
        for name in STEPS:  # a selection's minutes do not include the cost of first calls
            Selection(runner, warm_up, min(tokens, WARM_UP_TOKENS)).step(name)()
        selection = Selection(runner, args, tokens)
        samples: dict[str, harness.Sample] = {}
        for name in STEPS:
            samples[name] = timed(selection.step(name), args.repeats, device)
            speed = selection.operations(name) / samples[name].median / ranks.size
            report.note(
                f"{name}: {samples[name].median:.1f} s, {speed / 1e12:.3g} T operations/s a process"
            )
        whole = sum(sample.median for sample in samples.values())
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        report.note(
            f"one capability of {args.pairs} pairs at {harness.size_name(tokens)}: {whole:.1f} s"
            + (f", at most {peak:.1f} GiB" if peak else "")
        )
        report.add(tokens, samples)
    report.finish()
    ranks.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
