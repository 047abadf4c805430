#!/usr/bin/env python
"""Run a grid of variants and seeds, and show the results. See --help."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

# Must be set before torch is imported: this process only plans, its workers compute with --threads each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_hydra.arguments import command_parser, path_argument, real
from megatron_hydra.errors import HydraError, command

DESCRIPTION = """\
run:   compute every cell (variant × seed) of the experiment files: select heads, convert, train the
       stages, export, evaluate. Steps are saved in OUTPUT/steps under a hash of their inputs. Cells and
       experiments share a step if its inputs are the same. The same command resumes a stopped run.
       If a cell fails, its log is named and the other cells still run; the exit status is then 1.
table: write OUTPUT/<experiment>/table.md and results.json from the finished cells, and print the table.
plot:  plot accuracy against length for every task, bars and losses, into OUTPUT/<experiment>/.
pack:  copy records, logs, head maps, metrics and scores to another folder. Weights are not copied, so the
       folder is small enough to download. All verbs accept that folder as --output.
"""

EPILOG = """\
examples:
  python tools/experiment.py run configs/experiments/selection.yaml --workers 2
  python tools/experiment.py run configs/experiments/*.yaml --dry-run
  python tools/experiment.py run configs/experiments/real/chain.yaml --base mine.yaml --gpus 0,1 \\
      --tokens-scale 0.2 --stop-after 50
  python tools/experiment.py pack configs/experiments/real/chain.yaml --base mine.yaml --to results
  python tools/experiment.py table configs/experiments/selection.yaml
  python tools/experiment.py run configs/experiments/ratio.yaml \\
      --slurm '--gpus-per-node 1 --time 4:00:00 --array-limit 8'

docs/experiments.md explains the experiment file.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser(description=DESCRIPTION, epilog=EPILOG)
    p.add_argument("verb", choices=("run", "table", "plot", "pack"))
    p.add_argument("experiments", nargs="+", type=path_argument, metavar="EXPERIMENT.yaml")
    p.add_argument(
        "--output",
        type=path_argument,
        default=Path("runs/experiments"),
        help="folder for steps and results; experiments share it (%(default)s)",
    )
    p.add_argument(
        "--base",
        type=path_argument,
        metavar="FILE",
        help="replace the file that the experiments include, to run the same rows with another model, other "
        "stages and tasks; for example configs/experiments/shared/qwen3_1.7b.yaml",
    )
    p.add_argument(
        "--tokens-scale",
        type=real(0),
        default=1.0,
        metavar="X",
        help="multiply the token budget of every stage; each scale runs its own steps (%(default)s)",
    )
    run = p.add_argument_group("run")
    run.add_argument(
        "--workers",
        type=int,
        help="steps that run at the same time (default: one per GPU; 2 without a GPU)",
    )
    run.add_argument("--threads", type=int, default=1, help="CPU threads per worker (%(default)s)")
    run.add_argument(
        "--gpus",
        metavar="N,…",
        help="use only these of the visible GPUs. Workers get them in turn, one GPU each: with --workers 4 "
        "--gpus 0,1, each GPU runs two steps at a time (default: all, unless stages have several processes)",
    )
    run.add_argument(
        "--stop-after",
        type=real(0),
        metavar="MINUTES",
        help="start no step after this time; exit status is 85 if cells are not finished",
    )
    run.add_argument("--dry-run", action="store_true", help="print the steps without running them")
    run.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="VARIANT",
        help="run only this row; repeatable",
    )
    run.add_argument(
        "--slurm",
        metavar="OPTIONS",
        help="submit the cells as a SLURM array with launch/slurm.sh and these options",
    )
    p.add_argument_group("table").add_argument(
        "--page",
        type=path_argument,
        metavar="FILE.md",
        help="also write the table into this file, between its lines <!-- experiment NAME --> and <!-- end -->",
    )
    p.add_argument_group("pack").add_argument(
        "--to", type=path_argument, metavar="FOLDER", help="folder that receives the copy"
    )
    run.add_argument("--cell", default="", help=argparse.SUPPRESS)  # one task of that array
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if (args.workers is not None and args.workers < 1) or args.threads < 1:
        raise HydraError("--workers and --threads must be 1 or more")
    if args.tokens_scale <= 0:
        raise HydraError(f"--tokens-scale {args.tokens_scale} must be more than 0")
    if args.stop_after is not None and args.stop_after < 0:
        raise HydraError(f"--stop-after {args.stop_after}: minutes, 0 or more")
    from megatron_hydra.experiments.command import Request, draw, pack, run, show

    names = [path.stem for path in args.experiments]
    if twice := {name for name in names if names.count(name) > 1}:
        raise HydraError(f"two experiment files are called {min(twice)}")
    request = Request(
        files=args.experiments,
        output=args.output,
        workers=args.workers,
        threads=args.threads,
        gpus=None if args.gpus is None else _numbers(args.gpus),
        stop_after=args.stop_after,
        tokens_scale=args.tokens_scale,
        only=args.only,
        cell=args.cell,
        base=args.base,
        dry_run=args.dry_run,
        slurm=None if args.slurm is None else shlex.split(args.slurm),
        to=args.to,
        page=args.page,
    )
    action = {"run": run, "table": show, "plot": draw, "pack": pack}[args.verb]
    return action(request, lambda line: print(line, flush=True))


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
        raise HydraError(f"--gpus {text!r}: write numbers, each one once, as 0,1")
    return [int(part) for part in parts]


if __name__ == "__main__":
    raise SystemExit(main())
