#!/usr/bin/env python3
"""Train on long documents with several layouts: whether each runs, its speed and its memory.

First it makes a student of Qwen3-1.7B's shape with random weights (two FA heads in every layer) and one
document that fills the sequence. Then every layout trains on them for a few steps, by ``torchrun … -m
megatron_hydra.train`` with finetune.yaml and finetune_512k.yaml of configs/qwen3_1.7b/ours. A layout has
``--limit`` seconds. After these its processes are killed, and its row shows its last step. Losses and gradient
norms of one model and length must agree within bf16's rounding over layouts. If they do not, or if a layout
made too few steps, the status is 1. ``--models hydra,dense`` also trains the dense model of the same shape in
every layout, and prints how many times faster the hybrid's step is. Without a GPU, ``--tiny`` tries the script
over gloo.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_hydra.arguments import command_parser, path_argument

from megatron_hydra.parallel import platform  # isort: skip  (before anything of Megatron-Core)

from benchmarks import _harness as harness
from benchmarks import _models as models
from benchmarks._processes import Family
from megatron_hydra.checkpoint.store import save_canonical
from megatron_hydra.config.loading import load_run_config
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.data.indexed import write_index
from megatron_hydra.errors import HydraError, command
from megatron_hydra.reporting import METRICS_FILE

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = (
    "python -m benchmarks.long_context --output long_context     # layouts by the number of GPUs"
)
CONFIGS = ROOT / "configs" / "qwen3_1.7b" / "ours"
LOSS_BOUND, NORM_BOUND = 5e-3, 5e-2
"""Largest relative difference of a step's losses and gradient norms between layouts: bf16 has 8 bits, and every
layout has another order of sums."""
_SEQUENCE = ["parallel.sequence=true", "parallel.fa_partition=sequence"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout for one length.

    Attributes:
        gpus: number of GPUs.
        tokens: of the sequence.
        overrides: of the config.
    """

    gpus: int
    tokens: int
    overrides: tuple[str, ...]


LAYOUTS = {
    "context 4": Layout(4, 512 * 1024, ("parallel.context=4",)),
    "tensor 2, context 2": Layout(
        4, 512 * 1024, ("parallel.tensor=2", "parallel.context=2", *_SEQUENCE)
    ),
    "tensor 4": Layout(4, 512 * 1024, ("parallel.tensor=4", *_SEQUENCE)),
    "context 2": Layout(2, 256 * 1024, ("parallel.context=2",)),
    "tensor 2": Layout(2, 256 * 1024, ("parallel.tensor=2", *_SEQUENCE)),
    "one GPU": Layout(1, 128 * 1024, ()),
}
DEFAULT = {4: "context 4;tensor 2, context 2", 2: "context 2;tensor 2", 1: "one GPU"}
"""Layouts by number of GPUs; a machine uses its number, or the next smaller one."""


def make_inputs(folder: Path, chosen: dict[str, ModelConfig], tokens: list[int], seed: int) -> None:
    """A checkpoint of each model, and for each length ``document_N.bin/.idx``: random pieces, each twice."""
    for name, model in chosen.items():
        weights = models.random_weights(model, torch.bfloat16, seed)
        save_canonical(folder / name, weights, model)
    vocab_size = next(iter(chosen.values())).vocab_size
    rng = np.random.default_rng(seed)
    for length in tokens:
        # A part of the vocabulary, so that a few steps already change the loss.
        pieces = rng.integers(0, vocab_size // 8, (-(-length // 2048), 1024))
        document = np.concatenate((pieces, pieces), axis=1).reshape(-1)[:length]
        prefix = folder / f"document_{length}"
        prefix.with_suffix(".bin").write_bytes(document.astype("<i4").tobytes())
        lengths = np.array([length], dtype=np.int32)
        write_index(str(prefix.with_suffix(".idx")), np.int32, lengths, np.arange(2))


def _overrides(
    layout: Layout, tokens: int, folder: Path, model: str, output: Path, args: argparse.Namespace
) -> list[str]:
    """Overrides of the config, as words of the command line."""
    return [
        f"output={output}", f"student.checkpoint={folder / model}",
        f"data.blend=[{{path: {folder / f'document_{tokens}'}}}]", "data.tokenizer=''",
        f"data.sequence_length={tokens}", f"data.cache_dir={folder / 'packs'}",
        "batch.global_batch_size=1", "optimizer.lr=1e-4", "schedule.kind=constant",
        # One more step than measured, so that the measurement ends before the last step's checkpoint.
        "schedule.warmup_steps=0", f"schedule.steps={args.steps + 1}",
        "recompute.granularity=full", "logging.tensorboard=false", "logging.progress=false",
        *(["loss.chunk_tokens=128"] if args.tiny else []), *layout.overrides,
        *args.overrides,
    ]  # fmt: skip


def _command(layout: Layout, overrides: list[str]) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(layout.gpus), "-m", "megatron_hydra.train", "--config", str(CONFIGS / "finetune.yaml"),
        "--config", str(CONFIGS / "finetune_512k.yaml"), *overrides,
    ]  # fmt: skip


def run_layout(words: list[str], output: Path, steps: int, limit: float) -> dict[str, Any]:
    """Run a command until its metrics have so many steps, for ``limit`` seconds at most, and end all of it.

    Returns:
        ``metrics`` (the lines), ``arrived`` (seconds from the start to each of them), ``seconds``,
        ``ended`` (why), ``log``.
    """
    log = output.with_suffix(".log")
    begin = time.monotonic()
    arrived: list[float] = []
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    }
    with log.open("w") as file:
        family = Family(words, variables, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            while True:
                now = time.monotonic() - begin
                lines = _metrics(output)
                arrived += [now] * (len(lines) - len(arrived))
                status = family.process.poll()
                if len(lines) >= steps:
                    ended = "done"
                    break
                if status is not None:
                    ended = f"status {status}"
                    break
                if now > limit:
                    ended = f"limit of {limit:.0f} s"
                    break
                time.sleep(0.1)
        finally:
            family.kill()
    return {
        "metrics": lines[:steps], "arrived": arrived[:steps], "seconds": time.monotonic() - begin,
        "ended": ended, "log": str(log),
    }  # fmt: skip


def _metrics(output: Path) -> list[dict[str, Any]]:
    """The complete lines so far."""
    path = output / METRICS_FILE
    if not path.exists():
        return []
    return [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def expected(model: ModelConfig, layout: Layout, overrides: list[str]) -> dict[str, float]:
    """The planner's prediction: GiB of the fullest rank, and seconds of a step on H100s."""
    from megatron_hydra.planning.hardware import GPUS, Efficiency
    from megatron_hydra.planning.plan import plan_run
    from megatron_hydra.planning.timing import Machine

    run = load_run_config([CONFIGS / "finetune.yaml", CONFIGS / "finetune_512k.yaml"], overrides)
    plan = plan_run(model, run, layout.gpus, Machine(GPUS["h100"], Efficiency()))
    return {"gib": plan.memory.total / 2**30, "seconds": plan.time.total}


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a layout's table row, from its metrics; NaN where there is none."""
    metrics, arrived = row["metrics"], row["arrived"]
    later = metrics[1:]
    rates = sorted(line["tokens_per_s"] for line in later)
    return {
        "steps": len(metrics),
        "first_step_seconds": arrived[0] if arrived else math.nan,
        "tokens_per_s": rates[len(rates) // 2] if rates else math.nan,
        "step_seconds": (arrived[-1] - arrived[0]) / len(later) if later else math.nan,
        "memory_gib": max((line["memory_gb"] for line in metrics), default=math.nan) * 1e9 / 2**30,
        "losses": [line["loss"] for line in metrics],
        "grad_norms": [line["grad_norm"] for line in metrics],
    }


def disagreements(rows: list[dict[str, Any]]) -> list[str]:
    """Errors: a layout without a step, a loss that is not finite, layouts that differ."""
    found = []
    for row in rows:
        values = [*row["losses"], *row["grad_norms"]]
        if row["ended"] != "done":
            found.append(f"{row['layout']}: {row['ended']} after {row['steps']} steps")
        if any(value is None or not math.isfinite(value) for value in values):
            found.append(f"{row['layout']}: a loss or gradient norm is not finite: {values}")
    for index, row in enumerate(rows):
        for other in rows[:index]:
            if (other["tokens"], other["model"]) != (row["tokens"], row["model"]):
                continue
            for key, bound in (("losses", LOSS_BOUND), ("grad_norms", NORM_BOUND)):
                for step, (a, b) in enumerate(zip(row[key], other[key], strict=False), 1):
                    if a is not None and b is not None and not abs(a - b) <= bound * abs(b):
                        found.append(
                            f"step {step}, {key}: {a} with {row['layout']}, {b} with {other['layout']}: "
                            f"more than {bound:.1%} apart"
                        )
    return found


def speed_ups(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By layout, the dense model's seconds a step over the hybrid's, where both finished."""
    seconds = {(row["layout"], row["model"]): row["step_seconds"] for row in rows}
    found = {}
    for layout in dict.fromkeys(row["layout"] for row in rows):
        ratio = seconds.get((layout, "dense"), math.nan) / seconds.get((layout, "hydra"), math.nan)
        if not math.isnan(ratio):
            found[layout] = ratio
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | layout | tokens | steps | to the first step | a step | tokens/s | peak memory (planned) "
        "| losses |",
        "|---|---|---:|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        steps = str(row["steps"]) if row["ended"] == "done" else f"{row['steps']} ({row['ended']})"
        losses = " ".join("–" if loss is None else f"{loss:.4f}" for loss in row["losses"])
        cells = (
            row["model"], row["layout"], harness.size_name(row["tokens"]), steps,
            _shown(row["first_step_seconds"], ".0f", " s"),
            _shown(row["step_seconds"], ".1f", " s"), _shown(row["tokens_per_s"], ",.0f"),
            f"{_shown(row['memory_gib'], '.1f')} ({row['planned']['gib']:.1f}) GiB", losses,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(number: float, how: str, unit: str = "") -> str:
    return "–" if math.isnan(number) else f"{number:{how}}{unit}"


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(description=__doc__, epilog=f"example:\n  {EXAMPLE}\n")
    add = parser.add_argument
    add(
        "--output",
        type=path_argument,
        required=True,
        help="folder for inputs, logs, long_context.json and table.md",
    )
    add(
        "--layouts",
        help=f"separated by ';', of: {'; '.join(LAYOUTS)} (default: by the number of GPUs)",
    )
    add("--models", default="hydra", help="of hydra,dense, separated by commas (default hydra)")
    add("--tokens", type=harness.sizes_of, help="of the sequence, as 512K (default: the layout's)")
    add("--steps", type=int, default=4, help="to wait for (default 4)")
    add("--limit", type=float, default=540, help="seconds of a layout (default 540)")
    add("--seed", type=int, default=0)
    add("--tiny", action="store_true", help="a toy shape in fp32, to try the script out")
    add("--make", action="store_true", help=argparse.SUPPRESS)
    add("overrides", nargs="*", metavar="section.key=value", help="of the config")
    return parser


def _chosen(args: argparse.Namespace) -> dict[str, Layout]:
    """The layouts to run.

    Raises:
        HydraError: an unknown name, or too few GPUs for one.
    """
    gpus = platform.device_count()
    if not gpus and not args.tiny:
        raise HydraError("there is no GPU here; --tiny tries the script out on the CPU")
    names = args.layouts or DEFAULT[max(n for n in DEFAULT if n <= (gpus or 2))]
    chosen = {}
    for name in (part.strip() for part in names.split(";")):
        if name not in LAYOUTS:
            raise HydraError(f"--layouts: {name!r} is unknown; known: {'; '.join(LAYOUTS)}")
        layout = LAYOUTS[name]
        if gpus and layout.gpus > gpus:
            raise HydraError(f"--layouts: {name!r} takes {layout.gpus} GPUs, here are {gpus}")
        tokens = args.tokens[0] if args.tokens else 512 if args.tiny else layout.tokens
        chosen[name] = dataclasses.replace(layout, tokens=tokens)
    return chosen


def _chosen_models(args: argparse.Namespace) -> dict[str, ModelConfig]:
    """The models to train.

    Raises:
        HydraError: an unknown name.
    """
    shape = models.TINY if args.tiny else models.QWEN3_1_7B
    known = {"hydra": models.hybrid(shape, 1 if args.tiny else 2), "dense": shape}
    names = [part.strip() for part in args.models.split(",")]
    for name in names:
        if name not in known:
            raise HydraError(f"--models: {name!r} is unknown; known: {', '.join(known)}")
    return {name: known[name] for name in names}


@command
def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_intermixed_args(arguments)
    if args.steps < 2:
        raise HydraError("--steps: at least 2, the first is not timed")
    chosen, trained = _chosen(args), _chosen_models(args)
    if args.tiny:
        args.overrides = ["precision=fp32", *args.overrides]
    folder = args.output.resolve()
    if args.make:
        make_inputs(folder, trained, sorted({lay.tokens for lay in chosen.values()}), args.seed)
        return 0
    return _measure(args, chosen, trained, folder, sys.argv[1:] if arguments is None else arguments)


def _provide_inputs(
    folder: Path, trained: dict[str, ModelConfig], tokens: list[int], seed: int, words: list[str]
) -> None:
    """Make the inputs, or use the inputs that an earlier call made for the same lengths."""
    shapes = {name: dataclasses.asdict(model) for name, model in trained.items()}
    wanted = {"models": shapes, "tokens": tokens, "seed": seed}
    text, made = json.dumps(wanted, sort_keys=True), folder / "inputs.json"
    if made.exists() and made.read_text() == text:
        print("inputs: made by an earlier call", flush=True)
        return
    for name in (*trained, "packs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    made.unlink(missing_ok=True)
    begin = time.monotonic()
    # A process of its own frees the GPU's context and memory when the weights are made.
    maker = [sys.executable, "-m", "benchmarks.long_context", "--make", *words]
    if status := subprocess.run(maker, cwd=ROOT, check=False).returncode:
        raise HydraError(
            f"making the models and their document ended with status {status}, see above"
        )
    made.write_text(text)
    print(f"inputs: {time.monotonic() - begin:.0f} s", flush=True)


def _measure(
    args: argparse.Namespace,
    chosen: dict[str, Layout],
    trained: dict[str, ModelConfig],
    folder: Path,
    words: list[str],
) -> int:
    # As Ctrl-C: also end the ranks of the running layout.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    (folder / "runs").mkdir()
    _provide_inputs(
        folder, trained, sorted({layout.tokens for layout in chosen.values()}), args.seed, words
    )
    device = torch.device("cuda" if platform.device_count() else "cpu")
    body: dict[str, Any] = {"machine": harness.machine(device), "rows": []}
    body["machine"]["gpus"] = platform.device_count()
    for (name, layout), (model_name, model) in itertools.product(chosen.items(), trained.items()):
        output = folder / "runs" / f"{model_name}_{name.replace(', ', '_').replace(' ', '')}"
        overrides = _overrides(layout, layout.tokens, folder, model_name, output, args)
        row: dict[str, Any] = {"layout": name, "model": model_name, "tokens": layout.tokens}
        row["overrides"] = overrides
        row |= run_layout(_command(layout, overrides), output, args.steps, args.limit)
        row |= summary(row) | {"planned": expected(model, layout, overrides)}
        body["rows"].append(row)
        (folder / "long_context.json").write_text(json.dumps(body, indent=1) + "\n")
        print(table([row]).splitlines()[-1], flush=True)
        if row["ended"] != "done":
            print(_tail(Path(row["log"])), flush=True)
    body["speed_ups"] = speed_ups(body["rows"])
    (folder / "long_context.json").write_text(json.dumps(body, indent=1) + "\n")
    (folder / "table.md").write_text(table(body["rows"]) + "\n")
    print(table(body["rows"]))
    for name, ratio in body["speed_ups"].items():
        print(f"{name}: a step of the hybrid is {ratio:.2f} times as fast as the dense model's")
    problems = disagreements(body["rows"])
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


if __name__ == "__main__":
    raise SystemExit(main())
