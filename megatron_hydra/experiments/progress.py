"""One line on a terminal with the running steps; training steps show step and loss."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from megatron_hydra.experiments.plan import Step
from megatron_hydra.experiments.store import StepStore
from megatron_hydra.reporting import METRICS_FILE

_TAIL_BYTES = 8192
"""More bytes than the longest line of metrics."""


class ProgressLine:
    """Shows nothing if ``stream`` is not a terminal; every finished step has its line anyway.

    Args:
        store: where the steps are.
        stream: the terminal; default: stderr.
    """

    def __init__(self, store: StepStore, stream: TextIO | None = None) -> None:
        self.store, self.stream = store, stream or sys.stderr
        self.is_terminal = self.stream.isatty()

    def show(self, running: Iterable[Step], left: str) -> None:
        """Draw the line, cut at the terminal's width."""
        if self.is_terminal:
            text = " | ".join([*(self._describe(step) for step in running), left])
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r\x1b[K{text[:width]}")
            self.stream.flush()

    def clear(self) -> None:
        """Remove the line."""
        if self.is_terminal:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def _describe(self, step: Step) -> str:
        text = f"{step.row} {step.kind}"
        entry = _last_entry(self.store.out(step) / METRICS_FILE) if step.action == "stage" else None
        if entry is None:
            return text
        number, loss = entry
        return f"{text} {number}/{step.params['config']['schedule']['steps']} loss {loss:.2f}"


def _last_entry(path: Path) -> tuple[int, float] | None:
    """Step and loss of the last complete line of a run's metrics."""
    try:
        with open(path, "rb") as file:
            file.seek(-min(_TAIL_BYTES, os.fstat(file.fileno()).st_size), os.SEEK_END)
            lines = file.read().rpartition(b"\n")[0].splitlines()
    except FileNotFoundError:
        return None
    body = json.loads(lines[-1]) if lines else {}
    return None if body.get("loss") is None else (int(body["step"]), float(body["loss"]))
