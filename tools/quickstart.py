#!/usr/bin/env python
"""Run the whole method on a tiny model, on a CPU, in minutes. See --help."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Must be set before torch is imported: this process only plans and draws, its workers compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from megatron_hydra.arguments import command_parser, path_argument, seed_argument
from megatron_hydra.errors import HydraError, command
from megatron_hydra.experiments.quickstart import Settings, run_quickstart

DESCRIPTION = """\
A tiny Qwen3 (4 layers, 32 query heads; shipped, with the script that trained it) becomes a
HydraHead: head selection, conversion at 7:1, align, distill, finetune, export, evaluation at 1, 2,
4 and 8 times the training length. Two controls run the same pipeline: random heads, and no
full-attention head at all. The results are a table, OUTPUT/metrics.json and three pictures. The
same command resumes a stopped run.
"""

EPILOG = """\
example:
  python tools/quickstart.py --output quickstart
  python tools/quickstart.py --output runs/quickstart-1 --seed 1
  python tools/quickstart.py --output runs/longer --set schedule.steps=300
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser(description=DESCRIPTION, epilog=EPILOG)
    configs = Path(__file__).resolve().parents[1] / "configs" / "quickstart"
    p.add_argument(
        "--output",
        type=path_argument,
        default=Path("quickstart"),
        help="output folder (%(default)s)",
    )
    p.add_argument(
        "--seed",
        type=seed_argument,
        default=0,
        help="seed of prompts, random heads and data order (%(default)s)",
    )
    p.add_argument(
        "--fresh",
        action="store_true",
        help="delete an earlier run with these settings in OUTPUT first",
    )
    p.add_argument(
        "--samples",
        type=int,
        help="evaluation sequences per length (default: the recipe's, 32)",
    )
    p.add_argument(
        "--configs",
        type=path_argument,
        default=configs,
        help="folder of the recipe, quickstart.yaml, and the stage configs (configs/quickstart)",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key in the config of every stage; repeatable",
    )
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.samples is not None and args.samples < 1:
        raise HydraError(f"--samples is {args.samples}: it must be 1 or more")
    run_quickstart(
        args.output.resolve(),
        args.configs.resolve(),
        Settings(seed=args.seed, samples=args.samples or 0, overrides=tuple(args.set)),
        fresh=args.fresh,
        say=lambda line: print(line, flush=True),
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
