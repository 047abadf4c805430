"""An experiment as a SLURM array: one task for each cell, through ``launch/slurm.sh``."""

from __future__ import annotations

import hashlib
import subprocess
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.plan import Plan
from megatron_hydra.experiments.store import StepStore
from megatron_hydra.files import write_text_atomic


def as_word(cell: str) -> str:
    """A cell's name without blanks, at which an array's line would be split."""
    return urllib.parse.quote(cell, safe="")


def from_word(word: str) -> str:
    """Inverse of :func:`as_word`."""
    return urllib.parse.unquote(word)


def submit(
    plan: Plan,
    store: StepStore,
    reads: Sequence[str],
    options: Sequence[str],
    say: Callable[[str], None],
) -> int:
    """Submit every cell of the plan that is not finished.

    A task computes the steps of its cell. It waits for a step that another task computes, and reads finished
    steps from the shared folder. So shared steps are computed once. Cells are submitted by name, in a file
    named by its content. So neither a new row of an experiment file nor another submission changes a pending
    task.

    Args:
        reads: absolute paths of the experiment files, with the flags for reading them.
        options: words for ``launch/slurm.sh`` (``--gpus-per-node 1 --time 4:00:00``).

    Returns:
        slurm.sh's exit status.

    Raises:
        HydraError: a path has a blank, which an array's line cannot have.
    """
    missing = [name for name, key in plan.cells.items() if not store.is_done(plan.steps[key])]
    if not missing:
        say("every cell is finished")
        return 0
    root = Path(__file__).resolve().parents[2]
    words = [
        "run",
        *reads,
        "--output",
        str(store.root),
        "--workers",
        "1",
    ]
    if blank := [word for word in words if any(c.isspace() for c in word)]:
        raise HydraError(f"{blank[0]!r} holds a blank: SLURM array tasks cannot be given that path")
    lines = "".join(f"--cell {as_word(name)}\n" for name in missing)
    array = store.root / f"array-{hashlib.sha256(lines.encode()).hexdigest()[:12]}.txt"
    write_text_atomic(array, lines)
    command = ["bash", str(root / "launch" / "slurm.sh"), *options, "--array", str(array)]
    # For any number of GPUs, a task is one process, which starts the ranks of a stage itself.
    command += ["--procs-per-node", "1", str(root / "tools" / "experiment.py"), *words]
    say(f"{len(missing)} of {len(plan.cells)} cells are not finished")
    return subprocess.run(command, check=False).returncode
