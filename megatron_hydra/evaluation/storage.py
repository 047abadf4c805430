"""Output folder of an evaluation: saves finished cells, and loads them on resume."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_hydra.errors import HydraError
from megatron_hydra.files import write_json_atomic

QUESTIONS = 0
"""In the place of a length: the metrics of one of lm-eval's tasks."""
FORMAT = "hydra-evaluation-settings"
"""Marker in ``settings.json`` of a folder that ``--force`` may clear."""


class CellStore:
    """One JSON file for each finished (task, length), under ``<folder>/cells``.

    Args:
        folder: the output folder.
        settings: all settings that determine the results; a folder with other settings is refused.
        force: delete an evaluation with other settings instead.

    Raises:
        HydraError: the folder has an evaluation with other settings, or other files (which ``force`` does not
            delete), or is a file.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], force: bool) -> None:
        self.folder = folder
        self.cells = folder / "cells"
        marker = folder / "settings.json"
        if folder.exists() and not folder.is_dir():
            raise HydraError(f"output {folder} is a file: give a folder")
        if folder.exists() and any(folder.iterdir()):
            before = self._saved_settings(marker)
            differing = _first_difference(before, settings)
            if differing and force:
                self._clear()
            elif differing:
                raise HydraError(
                    f"output {folder} holds an evaluation with another {differing} "
                    f"({_short(before.get(differing))}, now {_short(settings.get(differing))}): give another "
                    "folder, or --force to delete it"
                )
        write_json_atomic(marker, {"format": FORMAT, **settings})

    def _saved_settings(self, marker: Path) -> dict[str, Any]:
        try:
            before = json.loads(marker.read_text())
        except (OSError, ValueError):
            before = None
        if not isinstance(before, dict) or before.pop("format", None) != FORMAT:
            raise HydraError(
                f"output {self.folder} is not empty and not an evaluation of this version: give another "
                "folder, or delete it yourself"
            )
        return before

    def _clear(self) -> None:
        """Delete the files of an evaluation, except the marker, which is rewritten."""
        for pattern in ("cells/*.json", "heatmap_*.png", "accuracy.png", "results.json"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def path(self, task: str, length: int) -> Path:
        """The file of a cell."""
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in task)
        if safe != task:
            safe += "-" + hashlib.sha256(task.encode()).hexdigest()[:8]
        return self.cells / f"{safe}--{length}.json"

    def load(self, task: str, length: int) -> dict[str, Any] | None:
        """A finished cell, or ``None``."""
        path = self.path(task, length)
        if not path.exists():
            return None
        cell = _read(path)
        cell.pop("task", None)
        return cell

    def save(self, task: str, length: int, cell: dict[str, Any]) -> None:
        """Save a finished cell, with its task: the file's name may differ from it."""
        write_json_atomic(self.path(task, length), {"task": task, **cell})


def unfinished_results(folder: Path) -> dict[str, Any]:
    """The finished cells of an evaluation that has been stopped or is running.

    Args:
        folder: its output folder; it need not exist.

    Returns:
        The keys ``tasks`` and ``lm_eval`` of ``results.json``, as far as they are known.
    """
    tasks: dict[str, dict[str, Any]] = {}
    questions: dict[str, Any] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        task, _, length = path.stem.rpartition("--")
        cell = _read(path)
        task = cell.pop("task", task)
        if int(length) == QUESTIONS:
            questions |= cell
        else:
            tasks.setdefault(task, {})[length] = cell
    return {"tasks": tasks, "lm_eval": {"tasks": questions}}


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise HydraError(f"{path} cannot be read ({error}): delete it and run again") from None


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first key, in alphabetical order, whose values differ; empty if all are equal."""
    plain = json.loads(json.dumps(now))
    keys = sorted(before.keys() | plain.keys())
    return next((key for key in keys if before.get(key) != plain.get(key)), "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
