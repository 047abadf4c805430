"""What a run says about itself: ``metrics.jsonl``, TensorBoard, a progress bar. Rank 0 only."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_hydra.config.run import LoggingConfig
from megatron_hydra.errors import HydraError

METRICS_FILE = "metrics.jsonl"


def _jsonable(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value


def truncate_metrics(path: str | os.PathLike[str], last_step: int) -> None:
    """Drop lines after ``last_step``, and half-written ones, so that no step appears twice."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


class MetricsLog:
    """One JSON line a step, scalars to TensorBoard, a bar on stderr."""

    def __init__(
        self,
        output: str | os.PathLike[str],
        config: LoggingConfig,
        *,
        first_step: int,
        total_steps: int,
        enabled: bool,
        title: str = "",
    ) -> None:
        """Open the log.

        Args:
            output: the run's folder.
            first_step: steps done before; later lines of an earlier attempt are dropped.
            enabled: False on all ranks but the first: every method then does nothing.
            title: shown by the bar.

        Raises:
            HydraError: TensorBoard is wanted and not installed.
        """
        self.enabled = enabled
        self._writer = self._bar = None
        if not enabled:
            return
        output = Path(output)
        truncate_metrics(output / METRICS_FILE, first_step)
        self._file = open(output / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115
        if config.tensorboard:
            self._writer = _tensorboard(output / "tensorboard", first_step + 1)
        if config.progress:
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=first_step, desc=title, unit="step")

    def write(self, entry: dict[str, Any]) -> None:
        """Record one step. ``entry`` holds ``step`` and JSON-able values."""
        if not self.enabled:
            return
        entry = {key: _jsonable(value) for key, value in entry.items()}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in _scalars(entry):
                self._writer.add_scalar(name, value, entry["step"])

    def advance(self, step: int, loss: float) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def sync(self) -> None:
        """Make everything written so far durable (called before a checkpoint counts)."""
        if self.enabled:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        if self.enabled:
            self.sync()
            self._file.close()
            if self._writer is not None:
                self._writer.close()
            if self._bar is not None:
                self._bar.close()
            self.enabled = False


def _scalars(entry: dict[str, Any]) -> list[tuple[str, float]]:
    """The numbers of an entry; a list becomes one series per index (a layer)."""
    found: list[tuple[str, float]] = []
    for name, value in entry.items():
        if isinstance(value, list):
            found += [(f"{name}/{i:02d}", v) for i, v in enumerate(value) if _is_number(v)]
        elif name != "step" and _is_number(value):
            found.append((name, value))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tensorboard(folder: Path, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise HydraError(
            "logging.tensorboard is true, but tensorboard is not installed: pip install "
            "tensorboard, or set logging.tensorboard=false"
        ) from None
    return SummaryWriter(str(folder), purge_step=purge_step)
