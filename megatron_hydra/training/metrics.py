"""Metrics, events and progress bar of a run. Only rank 0 writes them.

``metrics.jsonl`` and ``events.jsonl`` are always written. :mod:`megatron_hydra.training.sinks` has the other
outputs that the config can select.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_hydra.config.run import LoggingConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.files import write_text_atomic
from megatron_hydra.reporting import EVENTS_FILE, METRICS_FILE
from megatron_hydra.training.sinks import JsonLines, Sink, TensorBoard, WeightsAndBiases

_log = logging.getLogger(__name__)


def _jsonable(value: Any) -> Any:
    """Replace numbers that are not finite by None, because JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return value


def truncate_metrics(path: str | os.PathLike[str], last_step: int) -> None:
    """Delete lines after ``last_step`` and half-written lines, so that no step appears twice."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text_atomic(path, "".join(kept))


class MetricsLog:
    """Write one entry per step to every sink, events, and a progress bar on stderr.

    As a context manager it closes at the end of the block. If the block raises an error, errors during the
    close are only logged, so they do not hide the first error.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        config: LoggingConfig,
        *,
        first_step: int,
        total_steps: int,
        enabled: bool,
        title: str = "",
        run_config: dict[str, Any] | None = None,
    ) -> None:
        """Open the log.

        Args:
            output: the run's folder.
            first_step: steps done before; later lines of an earlier attempt are deleted.
            enabled: False on all ranks but the first; every method then does nothing.
            title: title of the progress bar.
            run_config: the resolved config, for sinks that store it.

        Raises:
            HydraError: a file cannot be written, or the package of a sink is not installed.
        """
        self.enabled = enabled
        self._sinks: list[Sink] = []
        self._bar = None
        if not enabled:
            return
        output = Path(output)
        truncate_metrics(output / METRICS_FILE, first_step)
        self._events = JsonLines(output / EVENTS_FILE)
        self._sinks.append(JsonLines(output / METRICS_FILE))
        if config.tensorboard:
            self._sinks.append(TensorBoard(output / "tensorboard", first_step + 1))
        if config.wandb != "none":
            self._sinks.append(WeightsAndBiases(output, config, title, run_config or {}))
        if config.progress:
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=first_step, desc=title, unit="step")

    def write(self, entry: dict[str, Any]) -> None:
        """Record one step. ``entry`` holds ``step`` and JSON-able values."""
        entry = {key: _jsonable(value) for key, value in entry.items()}
        for sink in self._sinks:
            sink.write(entry)

    def event(self, name: str, step: int, **facts: Any) -> None:
        """Record an event: start, save, skipped step, stop. Events of all attempts are kept."""
        if self.enabled:
            entry = {"time": round(time.time(), 3), "event": name, "step": step, **facts}
            self._events.write({key: _jsonable(value) for key, value in entry.items()})

    def advance(self, step: int, loss: float) -> None:
        """Advance the progress bar."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def sync(self) -> None:
        """Sync all entries to disk (called before a checkpoint becomes valid)."""
        for sink in self._sinks:
            sink.sync()
        if self.enabled:
            self._events.sync()

    def close(self) -> None:
        """Flush and close everything; safe to call twice.

        Raises:
            HydraError: a sink could not be closed; all other sinks are closed.
        """
        if not self.enabled:
            return
        self.enabled = False
        sinks, self._sinks = self._sinks, []
        with contextlib.ExitStack() as stack:
            for part in (self._bar, self._events, *sinks):
                if part is not None:
                    stack.callback(part.close)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            self.close()
        except HydraError as second:
            if error is None:
                raise
            _log.warning("%s", second)


def where_it_runs(world_size: int) -> dict[str, Any]:
    """Facts about this attempt for its ``start`` event."""
    job = {"job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
    return {"host": socket.gethostname(), "processes": world_size, **job}
