"""An experiment as a SLURM array: one task a cell, through ``launch/slurm.sh``."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_hydra.checkpoint.atomic import write_text_atomic
from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.plan import Plan
from megatron_hydra.experiments.store import StepStore


def submit(
    plan: Plan,
    store: StepStore,
    files: Sequence[Path],
    options: Sequence[str],
    say: Callable[[str], None],
) -> int:
    """Submit every cell that is not finished.

    A task computes what its cell needs. A step that another task is computing is waited for, and
    one that it has finished is read from the shared folder, so shared steps are computed once.

    Args:
        files: the experiment files, as the tasks will read them.
        options: words for ``launch/slurm.sh`` (``--gpus-per-node 1 --time 4:00:00``).

    Returns:
        slurm.sh's exit status.

    Raises:
        HydraError: a path holds a blank, which an array's line cannot.
    """
    missing = [
        number
        for number, key in enumerate(plan.cells.values())
        if not store.is_done(plan.steps[key])
    ]
    if not missing:
        say("every cell is finished")
        return 0
    root = Path(__file__).resolve().parents[2]
    words = [
        "run",
        *(str(f.resolve()) for f in files),
        "--output",
        str(store.root),
        "--workers",
        "1",
    ]
    if blank := [word for word in words if any(c.isspace() for c in word)]:
        raise HydraError(f"{blank[0]!r} holds a blank: SLURM array tasks cannot be given that path")
    array = store.root / "array.txt"
    write_text_atomic(array, "".join(f"--cell {number}\n" for number in missing))
    command = ["bash", str(root / "launch" / "slurm.sh"), *options, "--array", str(array)]
    command += [str(root / "tools" / "experiment.py"), *words]
    say(f"{len(missing)} of {len(plan.cells)} cells are not finished")
    return subprocess.run(command, check=False).returncode
