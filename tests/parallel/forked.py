"""Run a module in forked ranks, as ``torchrun -m`` would: ``python -m tests.parallel.forked 4 MODULE ...``"""

from __future__ import annotations

import importlib
import runpy
import sys

from tests.forking import run_ranks


def main(processes: str, module: str, *arguments: str) -> int:
    """The exit status of the rank that failed first, or 0."""
    importlib.import_module(
        module
    )  # imports all that it needs; every rank then runs it as its main program
    sys.argv = [module, *arguments]
    return run_ranks(int(processes), lambda: _run(module))


def _run(module: str) -> int:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
