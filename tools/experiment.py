#!/usr/bin/env python
"""Run a grid of variants and seeds, and show what came out. See --help."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

# Before torch is imported: this process plans, its workers compute with --threads each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_hydra.errors import HydraError, command

DESCRIPTION = """\
run:   compute every cell (variant × seed) of the experiment files: select heads, convert, train the
       stages, export, evaluate. Steps are kept in OUTPUT/steps under a hash of their inputs, so what
       cells or experiments share is computed once, and a run that was stopped goes on where it was.
       A cell that fails is named with its log, all others go on; the exit status is then 1.
table: write OUTPUT/<experiment>/table.md and results.json of what is finished, print the table.
plot:  draw accuracy against length for every task, and bars, into OUTPUT/<experiment>/.
"""

EPILOG = """\
examples:
  python tools/experiment.py run configs/experiments/selection.yaml --workers 2
  python tools/experiment.py run configs/experiments/*.yaml --dry-run
  python tools/experiment.py table configs/experiments/selection.yaml
  python tools/experiment.py run configs/experiments/ratio.yaml \\
      --slurm '--gpus-per-node 1 --time 4:00:00 --array-limit 8'

docs/experiments.md explains the experiment file.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("verb", choices=("run", "table", "plot"))
    p.add_argument("experiments", nargs="+", type=Path, metavar="EXPERIMENT.yaml")
    p.add_argument(
        "--output",
        type=Path,
        default=Path("runs/experiments"),
        help="folder of steps and results, shared by experiments (%(default)s)",
    )
    p.add_argument(
        "--base",
        type=Path,
        metavar="FILE",
        help="include this file in place of the one that the experiments name: another model, other "
        "stages and tasks under the same rows, as configs/experiments/shared/qwen3_1.7b.yaml",
    )
    run = p.add_argument_group("run")
    run.add_argument("--workers", type=int, default=2, help="steps at a time (%(default)s)")
    run.add_argument("--threads", type=int, default=1, help="threads of a worker (%(default)s)")
    run.add_argument("--dry-run", action="store_true", help="list the steps, compute nothing")
    run.add_argument(
        "--only", action="append", default=[], metavar="VARIANT", help="this row only; repeatable"
    )
    run.add_argument(
        "--slurm",
        metavar="OPTIONS",
        help="submit the cells as an array through launch/slurm.sh, with these options",
    )
    run.add_argument("--cell", default="", help=argparse.SUPPRESS)  # one task of that array
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.workers < 1 or args.threads < 1:
        raise HydraError("--workers and --threads must be 1 or more")
    from megatron_hydra.experiments.command import Request, draw, run, show

    names = [path.stem for path in args.experiments]
    if twice := {name for name in names if names.count(name) > 1}:
        raise HydraError(f"two experiment files are called {min(twice)}")
    request = Request(
        files=args.experiments,
        output=args.output,
        workers=args.workers,
        threads=args.threads,
        only=args.only,
        cell=args.cell,
        base=args.base,
        dry_run=args.dry_run,
        slurm=None if args.slurm is None else shlex.split(args.slurm),
    )
    action = {"run": run, "table": show, "plot": draw}[args.verb]
    return action(request, lambda line: print(line, flush=True))


if __name__ == "__main__":
    raise SystemExit(main())
