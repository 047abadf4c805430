"""Record cost and time of the units of a real selection, for ``test_time_left.py`` to replay.

    python -m tests.selection.record_chunks --hf-path MODEL --output tests/selection/recorded.json \\
        --num-prompts 10 --min-prompts 2 --probe-tokens 256

Time is the process' CPU time, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.selection import SelectionOptions, select, select_heads
from megatron_hydra.selection.time_left import Stage, TimeLeft
from megatron_hydra.selection.work import WorkBench


class _Recorder(TimeLeft):
    """Records every call."""

    events: list[list[Any]] = []  # noqa: RUF012 - one recording a process

    def plan(self, stage: Stage, cost: float) -> None:
        """See :class:`TimeLeft`."""
        self.events.append(["plan", *stage, _short(cost)])
        super().plan(stage, cost)

    def drop(self, task: str) -> None:
        """See :class:`TimeLeft`."""
        self.events.append(["drop", task])
        super().drop(task)

    def observe(self, kind: str, cost: float, seconds: float) -> None:
        """See :class:`TimeLeft`."""
        self.events.append(["observe", kind, _short(cost), _short(seconds)])
        super().observe(kind, cost, seconds)

    def done(self, stage: Stage, cost: float, seconds: float) -> None:
        """See :class:`TimeLeft`."""
        super().done(stage, cost, seconds)
        self.events[-1] = ["done", *stage, _short(cost), _short(seconds)]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _bench(*arguments: Any) -> WorkBench:
    bench = WorkBench(*arguments, clock=time.process_time)
    bench.time_left = _Recorder(bench.ranks.size)
    return bench


def main() -> None:
    """Select with the default tasks, and write the events."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf-path", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--num-prompts", type=int, required=True)
    parser.add_argument("--min-prompts", type=int, required=True)
    parser.add_argument("--probe-tokens", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    select.WorkBench = _bench  # type: ignore[misc, assignment]
    options = SelectionOptions(
        num_prompts=args.num_prompts, min_prompts=args.min_prompts, probe_tokens=args.probe_tokens
    )
    select_heads(args.hf_path, options=options, show_progress=True)
    rows = ",\n".join(json.dumps(event) for event in _Recorder.events)
    args.output.write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
