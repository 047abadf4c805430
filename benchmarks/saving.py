#!/usr/bin/env python3
"""The cost of a save: seconds for which training waits, for saves at once and in the background.

First it makes a student with random weights and a text. Then ``python -m megatron_hydra.train`` (under torchrun
for several processes) trains on them, once for each mode, and saves several times. Blocked is the time from a
step's end until the next step may begin. For a save at once it is the whole save. For a save in the background
it is the copy to the host, and completing the folder when the files are written. The step after a save shares
the host with the writing threads; its time is printed beside the other steps' time.

Checkpoints do not depend on kernels: ``backend.gated_delta_net=torch backend.fused_kernels=torch`` avoids their
compilation. A run keeps two checkpoints at a time: 2 × 28 GB for the 1.7B shape. Use ``--layers`` on a smaller
disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_hydra.arguments import command_parser, path_argument

from megatron_hydra.parallel import platform  # isort: skip  (before anything of Megatron-Core)

from benchmarks import _harness as harness
from benchmarks import _models as models
from megatron_hydra.checkpoint.store import save_canonical
from megatron_hydra.config.loading import apply_overrides, from_dict, to_yaml
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.data.indexed import write_index
from megatron_hydra.errors import HydraError, command
from megatron_hydra.reporting import EVENTS_FILE, METRICS_FILE

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = "python -m benchmarks.saving --shapes smollm2_135m,qwen3_1.7b --output saving"
TINY = dataclasses.replace(
    models.SMOLLM2_135M, num_layers=2, hidden_size=32, ffn_hidden_size=48, vocab_size=256,
    num_query_heads=4, num_kv_heads=2, head_dim=8,
)  # fmt: skip
SHAPES = {
    "smollm2_135m": models.hybrid(models.SMOLLM2_135M, 1),
    "qwen3_1.7b": models.hybrid(models.QWEN3_1_7B, 2),
    "tiny": models.hybrid(TINY, 1),
}
MODES = {"at once": False, "in the background": True}


def make_inputs(folder: Path, model: ModelConfig, tokens: int, seed: int) -> None:
    """Write ``student`` and ``text.bin/.idx``: documents of random tokens that fill a sequence."""
    weights = models.random_weights(model, torch.bfloat16, seed)
    save_canonical(folder / "student", weights, model)
    rng = np.random.default_rng(seed)
    lengths = np.full(64, tokens - 1, dtype=np.int32)  # one more token is its end
    text = rng.integers(0, model.vocab_size, int(lengths.sum()))
    (folder / "text.bin").write_bytes(text.astype("<i4").tobytes())
    write_index(str(folder / "text.idx"), np.int32, lengths, np.arange(len(lengths) + 1))


def run_config(folder: Path, output: Path, asynchronous: bool, args: argparse.Namespace) -> Path:
    """Write the run's YAML file; returns its path."""
    body = {
        "verb": "finetune",
        "output": str(output),
        "precision": "bf16",
        "student": {"checkpoint": str(folder / "student")},
        "data": {"blend": [{"path": str(folder / "text")}], "sequence_length": args.tokens},
        "batch": {"micro_batch_size": 1, "global_batch_size": args.processes},
        "optimizer": {"lr": 1e-4},
        "schedule": {"steps": args.interval * args.saves + args.interval - 1, "warmup_steps": 1},
        "checkpoint": {"interval": args.interval, "keep": 1, "asynchronous": asynchronous},
        "logging": {"tensorboard": False, "progress": False, "gamma_interval": 0},
    }
    config = apply_overrides(from_dict(RunConfig, body), args.overrides)
    path = output.with_suffix(".yaml")
    path.write_text(to_yaml(config))
    return path


def train(config: Path, processes: int) -> None:
    """Run the public command on a config.

    Raises:
        HydraError: it ended with an error; shows its last lines.
    """
    module = ["-m", "megatron_hydra.train", "--config", str(config)]
    if processes > 1:
        ranks = ["--standalone", f"--nproc-per-node={processes}"]
        module = ["-m", "torch.distributed.run", *ranks, *module]
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    log = config.with_suffix(".log")
    with log.open("w") as file:
        status = subprocess.run(
            [sys.executable, *module],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if status:
        tail = "\n".join(log.read_text().splitlines()[-20:])
        raise HydraError(f"the run of {config} ended with status {status}:\n{tail}")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_saves(output: Path) -> list[dict[str, float]]:
    """For each save except the last step's: ``begun`` and ``finished`` (seconds blocked), ``blocked``."""
    saves: dict[str, dict[str, float]] = {}
    for event in _lines(output / EVENTS_FILE):
        if event["event"] in ("save", "save begun"):
            part = "begun" if event["event"] == "save begun" else "finished"
            saves.setdefault(event["checkpoint"], {})[part] = event["seconds"]
    # In both modes, the last step's save waits for its files.
    timed = [save for name, save in sorted(saves.items())][:-1]
    return [
        {
            "begun": save.get("begun", 0.0),
            "finished": save["finished"],
            "blocked": sum(save.values()),
        }
        for save in timed
    ]


def read_steps(output: Path, interval: int) -> dict[str, float]:
    """Median seconds of forward, backward and update: for steps just after a save, and for the others.

    The first two steps do not count, because they compile kernels.
    """
    after, other = [], []
    for line in _lines(output / METRICS_FILE):
        seconds = line["seconds"]["forward_backward"] + line["seconds"]["optimizer"]
        if line["step"] > 2:
            (after if line["step"] % interval == 1 % interval else other).append(seconds)
    return {
        "after_a_save": statistics.median(after) if after else math.nan,
        "other": statistics.median(other) if other else math.nan,
    }


def measure(shape: str, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one shape in every mode; each is a row of the report."""
    model = SHAPES[shape]
    if args.layers:
        model = models.smaller(model, args.layers)
    began = time.monotonic()
    make_inputs(folder, model, args.tokens, args.seed)
    print(f"{shape}: inputs made in {time.monotonic() - began:.0f} s", flush=True)
    rows = []
    for mode, asynchronous in MODES.items():
        output = folder / mode.replace(" ", "_")
        train(run_config(folder, output, asynchronous, args), args.processes)
        (newest,) = (output / "checkpoints").glob("step_*")
        row = {
            "shape": shape, "layers": model.num_layers, "mode": mode,
            "gigabytes": sum(p.stat().st_size for p in newest.rglob("*") if p.is_file()) / 1e9,
            "saves": read_saves(output), "steps": read_steps(output, args.interval),
        }  # fmt: skip
        rows.append(row)
        print(_shown(row), flush=True)
        for path in sorted(newest.rglob("*"), reverse=True):  # the next mode needs the space
            path.unlink() if path.is_file() else path.rmdir()
    return rows


def _shown(row: dict[str, Any]) -> str:
    blocked = ", ".join(
        f"{s['blocked']:.2f} (begin {s['begun']:.2f}, complete {s['finished']:.2f})"
        for s in row["saves"]
    )
    return (
        f"{row['shape']} ({row['layers']} layers, {row['gigabytes']:.1f} GB), {row['mode']}: seconds blocked "
        f"{blocked}; a step {row['steps']['other']:.3f} s, after a save {row['steps']['after_a_save']:.3f} s"
    )


@command
def main(arguments: list[str] | None = None) -> int:
    parser = command_parser(description=__doc__, epilog=f"example:\n  {EXAMPLE}\n")
    add = parser.add_argument
    add("--shapes", default="smollm2_135m", help=f"comma-separated, of {', '.join(SHAPES)}")
    add("--layers", type=int, default=0, help="of every shape; 0: all it has")
    add("--tokens", type=int, default=4096, help="of a step and process (default 4096)")
    add("--saves", type=int, default=3, help="timed ones of each mode (default 3)")
    add("--interval", type=int, default=6, help="steps between saves (default 6)")
    add("--processes", type=int, default=1, help="one a GPU, data-parallel (default 1)")
    add(
        "--folder",
        type=path_argument,
        help="where checkpoints are written; default: a temporary folder",
    )
    add("--output", type=path_argument, help="folder for saving.json; default: none")
    add("--seed", type=int, default=0)
    add("overrides", nargs="*", metavar="section.key=value", help="of the config")
    args = parser.parse_intermixed_args(arguments)
    shapes = args.shapes.split(",")
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        raise HydraError(f"--shapes: {unknown[0]!r} is unknown; known: {', '.join(SHAPES)}")
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for shape in shapes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            rows += measure(shape, Path(name), args)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        body = {"machine": harness.machine(platform.device()), "rows": rows}
        (args.output / "saving.json").write_text(json.dumps(body, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
