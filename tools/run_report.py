#!/usr/bin/env python
"""Write one HTML page about a training run: curves, restarts, throughput, config."""

from __future__ import annotations

import argparse

from megatron_hydra.arguments import command_parser, path_argument
from megatron_hydra.errors import HydraError, command
from megatron_hydra.reporting.run_page import write_run_page

EPILOG = """\
example:
  python tools/run_report.py runs/distill
  python tools/run_report.py runs/distill --output distill.html

The page needs nothing else: no network, no server, no other file. A run may be reported while it runs.
"""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(description=__doc__, epilog=EPILOG)
    parser.add_argument("run", metavar="RUN", type=path_argument, help="the output folder of a run")
    parser.add_argument(
        "--output",
        type=path_argument,
        metavar="FILE",
        help="HTML page to write (default RUN/report.html)",
    )
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if not args.run.is_dir():
        raise HydraError(f"{args.run} is not a folder; give the output folder of a run")
    output = args.output or args.run / "report.html"
    write_run_page(args.run, output)
    print(output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
