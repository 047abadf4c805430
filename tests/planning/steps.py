"""Training steps measured on GPUs, and the planner's predictions for the same layouts.

``python -m tests.planning.steps`` prints the table of docs/planning.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from megatron_hydra.config.loading import from_dict
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.planning.hardware import Efficiency, find_gpu
from megatron_hydra.planning.models import read_model
from megatron_hydra.planning.plan import Plan, plan_run
from megatron_hydra.planning.timing import Machine
from tests.parallel.launch import ROOT

FILE = "docs/performance/steps_h200.json"
MEASURED: dict[str, Any] = json.loads((ROOT / FILE).read_text())

HEADER = (
    "| step | GPUs | launches | measured s | before | off | predicted s | off | waiting for the host |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One measured step.

    Attributes:
        row: a row of the file.
    """

    row: dict[str, Any]

    @property
    def best(self) -> float:
        """Measured seconds; the minimum if other jobs ran at the same time."""
        return float(self.row.get("fastest_tenth", self.row["seconds"]))

    def model(self) -> ModelConfig:
        """The trained model."""
        shapes = MEASURED["models"]
        name = self.row["model"]
        dense = (
            from_dict(ModelConfig, shapes[name])
            if name in shapes
            else read_model(f"Qwen/{name.replace('qwen', 'Qwen').replace('b', 'B')}")
        )
        if not self.row["head_map"]:
            return dense
        heads = tuple(map(tuple, MEASURED["head_maps"][self.row["head_map"]]))
        return dataclasses.replace(dense, hydra=HydraConfig(), full_attention_heads=heads)

    def run(self) -> RunConfig:
        """Its layout."""
        row = self.row
        body = {
            "verb": row["verb"], "output": "x", "precision": "bf16",
            "student": {"checkpoint": "student"},
            "teacher": {"checkpoint": "" if row["verb"] == "finetune" else "teacher"},
            "data": {"sequence_length": row["sequence_length"]},
            "batch": {
                "micro_batch_size": row["micro_batch_size"],
                "global_batch_size": row["global_batch_size"],
            },
        }  # fmt: skip
        return from_dict(RunConfig, {**body, **row["run"]})

    @functools.cached_property
    def plan(self) -> Plan:
        """The planner's prediction."""
        efficiency = dataclasses.replace(Efficiency(), **self.row["efficiency"])
        machine = Machine(find_gpu(MEASURED["gpu"]), efficiency)
        return plan_run(self.model(), self.run(), self.row["gpus"], machine)

    def line(self) -> str:
        """Its row of the table."""
        row, time = self.row, self.plan.time
        measured = f"{row['seconds']:.3g}"
        if "fastest_tenth" in row:
            measured += f", {row['fastest_tenth']:.3g} at best"
        before = row.get("predicted_before")  # newer rows have none
        shown = "– | –" if before is None else f"{before:.3g} | {before / self.best - 1:+.0%}"
        off = time.total / self.best - 1
        star = "" if row["alone"] else " *"
        size = "1.7B" if row["model"].startswith("qwen") else "135M"
        return (
            f"| {size}, {row['name']}{star} | {row['gpus']} | {time.launches.total:,.0f} | {measured} | "
            f"{shown} | {time.total:.3g} | {off:+.0%} | "
            f"{time.waiting / time.total:.0%} |"
        )


STEPS = [Step(row) for row in MEASURED["rows"]]


if __name__ == "__main__":
    print("\n".join([*HEADER, *(step.line() for step in STEPS)]))
