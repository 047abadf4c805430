from __future__ import annotations

from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

BODY = """
title: A title
seeds: [0, 1]
base:
  teacher: {{model: quickstart}}
  prepare: {{function: megatron_hydra.experiments.tiny:write_inputs}}
  selection: {{tasks: ["jsonl:{{prepare}}/selection.jsonl"], num_prompts: 6, min_prompts: 2}}
  student: {{calibration_file: "{{prepare}}/calibration.jsonl"}}
  stages:
    align:
      configs: [{configs}/quickstart/common.yaml, {configs}/quickstart/align.yaml]
      set: {{schedule.steps: 2, schedule.warmup_steps: 1}}
    distill:
      configs: [{configs}/quickstart/common.yaml, {configs}/quickstart/distill.yaml]
      set: {{schedule.steps: 2, schedule.warmup_steps: 1}}
  evaluation:
    tasks: [megatron_hydra.experiments.tiny:facts]
    lengths: [128, 256]
    samples: 2
    dtype: fp32
"""


@pytest.fixture
def write(tmp_path):
    """Write an experiment file: the shared part and the given sections."""

    def write_file(rest: str, name: str = "trial", body: str = BODY) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(body.format(configs=CONFIGS) + rest)
        return path

    return write_file
