"""Compare checkpoints of the GPU suite's runs on the CPU; the last line printed is JSON.

python -m tests.gpu.compare bits WHOLE OTHER…        # tensors of the last checkpoints that differ
python -m tests.gpu.compare gradients FOLDER RUN…    # against FOLDER's VERB-one and VERB-exact
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.training import tiny


def bits(whole: Path, *others: Path) -> dict[str, list[str]]:
    """Run -> parts of its last checkpoint that differ from those of ``whole``."""
    from tests.faults.runs import compare_checkpoints, newest

    expected = newest(whole / "checkpoints")
    return {run.name: compare_checkpoints(newest(run / "checkpoints"), expected) for run in others}


def _moments(run: Path) -> dict[str, torch.Tensor]:
    """Adam's first moments after step 1: the gradients times a constant."""
    tensors = tiny.everything(run / "checkpoints/step_00000001")
    return {name: x.float() for name, x in tensors.items() if ".exp_avg." in name}


def _errors(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of each parameter's gradient.

    The floor of the divisor is a thousandth of the whole gradient: some gradients are zero in theory (a key
    bias without rotary), or nearly zero.
    """
    assert got.keys() == exact.keys(), got.keys() ^ exact.keys()
    floor = 1e-3 * float(torch.stack([x.norm() for x in exact.values()]).norm())
    return {
        name: float((got[name] - x).norm() / x.norm().clamp_min(floor)) for name, x in exact.items()
    }


def gradients(folder: Path, *runs: str) -> dict[str, Any]:
    """Run -> errors against fp32, errors of one GPU in bf16, and both logs."""
    results = {}
    references: dict[str, Any] = {}
    for run in runs:
        verb = run.partition("-")[0]
        if verb not in references:
            exact = _moments(folder / f"{verb}-exact")
            references[verb] = exact, _errors(_moments(folder / f"{verb}-one"), exact)
        exact, of_one = references[verb]
        results[run] = {
            "errors": _errors(_moments(folder / run), exact),
            "errors_of_one": of_one,
            "metrics": tiny.read_metrics(folder / run),
            "metrics_of_one": tiny.read_metrics(folder / f"{verb}-one"),
            "metrics_exact": tiny.read_metrics(folder / f"{verb}-exact"),
        }
    return results


if __name__ == "__main__":
    kind, *words = sys.argv[1:]
    if kind == "bits":
        print(json.dumps(bits(*map(Path, words))))
    else:
        print(json.dumps(gradients(Path(words[0]), *words[1:])))
