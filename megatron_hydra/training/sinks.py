"""Sinks for metrics: one interface for JSON lines, TensorBoard and Weights & Biases."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hydra.config.run import LoggingConfig
from megatron_hydra.errors import HydraError


class Sink(abc.ABC):
    """Takes one entry per step: ``step``, numbers, lists of numbers (one per layer), and texts."""

    @abc.abstractmethod
    def write(self, entry: dict[str, Any]) -> None:
        """Record one step."""

    def sync(self) -> None:  # noqa: B027  (most have nothing to do)
        """Sync all entries to disk (called before a checkpoint becomes valid)."""

    @abc.abstractmethod
    def close(self) -> None:
        """Flush and close."""


@contextlib.contextmanager
def _writing(path: Path, advice: str = "") -> Iterator[None]:
    """Raise an error that names the file if the disk is full or the folder is not writable."""
    try:
        yield
    except OSError as error:
        raise HydraError(f"{path} cannot be written: {error}{advice}") from None


class JsonLines(Sink):
    """Append one JSON object per line. A half-written line of a killed process is removed.

    Raises:
        HydraError: the file cannot be written (from every method).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _writing(path):
            _drop_half_line(path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, entry: dict[str, Any]) -> None:
        """See :meth:`Sink.write`."""
        with _writing(self._path):
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """See :meth:`Sink.sync`."""
        with _writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """See :meth:`Sink.close`."""
        if not self._file.closed:
            with _writing(self._path):
                self._file.close()


def _drop_half_line(path: Path) -> None:
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


class TensorBoard(Sink):
    """Write scalars; a list becomes one series per index.

    Raises:
        HydraError: the package is not installed, or the folder cannot be written. Every method can raise
            it, also for an earlier entry, because a thread writes.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise HydraError(
                "logging.tensorboard is true, but tensorboard is not installed: pip install "
                "tensorboard, or set logging.tensorboard=false"
            ) from None
        self._folder = folder
        with self._writing():
            self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return _writing(self._folder, "; logging.tensorboard=false switches TensorBoard off")

    def write(self, entry: dict[str, Any]) -> None:
        """See :meth:`Sink.write`."""
        with self._writing():
            for name, value in scalars(entry).items():
                self._writer.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        """See :meth:`Sink.close`."""
        with self._writing():
            self._writer.close()


class WeightsAndBiases(Sink):
    """A W&B run in the run's folder. ``offline`` sends nothing; ``wandb sync`` can send it later.

    The id of the W&B run is derived from the folder, so a resumed run continues the same W&B run. W&B itself
    reads the API key (from its login or WANDB_API_KEY); the key is never in our configs or logs.

    Raises:
        HydraError: the package is not installed or does not start.
    """

    def __init__(
        self, output: Path, config: LoggingConfig, title: str, run_config: dict[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise HydraError(
                f"logging.wandb is {config.wandb!r}, but wandb is not installed: pip install wandb, "
                "or set logging.wandb=none"
            ) from None
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                name=f"{title} {output.name}".strip(),
                id=hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16],
                dir=str(output),
                mode=config.wandb,
                resume="allow",
                config=run_config,
            )
        except Exception as error:  # W&B's error classes depend on the version
            raise HydraError(
                f"logging.wandb is {config.wandb!r}, but wandb does not start: {error}; "
                "logging.wandb=offline needs no network and no login"
            ) from None
        self._run.define_metric("*", step_metric="step")

    def write(self, entry: dict[str, Any]) -> None:
        """See :meth:`Sink.write`."""
        self._run.log(scalars(entry) | {"step": entry["step"]})

    def close(self) -> None:
        """See :meth:`Sink.close`."""
        self._run.finish()


def scalars(entry: dict[str, Any]) -> dict[str, float]:
    """The numbers of an entry; a list becomes ``name/00 …`` (one per layer), a dict ``name/key …``."""
    return {name: value for name, value in _leaves("", entry) if name != "step"}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, float]]:
    parts: list[tuple[str, Any]] = []
    if isinstance(value, list):
        parts = [(f"{i:02d}", v) for i, v in enumerate(value)]
    elif isinstance(value, dict):
        parts = list(value.items())
    elif _is_number(value):
        yield name, value
    for key, part in parts:
        yield from _leaves(f"{name}/{key}" if name else str(key), part)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
