"""Where a quickstart run keeps its files, and which of its phases are finished."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_hydra.errors import HydraError
from megatron_hydra.files import write_json_atomic, write_text_atomic

STUDENTS = ("hydra", "random", "all_gdn")
"""Selected heads; random heads at the same ratio; no full attention at all."""
STAGES = ("align", "distill", "finetune")

FORMAT = "hydra-quickstart"
"""What ``settings.json`` says of a folder that ``--fresh`` may clear."""
_FOLDERS = (
    "checkpoints", "evaluation", "exports", "head_maps", "logs", "modules", "phases", "prompts", "runs",
)  # fmt: skip
_FILES = ("commands.sh", "metrics.json", "settings.json", "*.png")


def shipped_teacher() -> Path:
    """The folder of the teacher that comes with the package (Hugging Face format)."""
    return Path(str(resources.files("megatron_hydra.quickstart").joinpath("shipped_teacher")))


class Workspace:
    """The output folder.

    Layout: ``prompts/``, ``head_maps/``, ``checkpoints/`` (the teacher and the students before
    training), ``runs/<student>/<stage>/``, ``exports/<student>/``, ``evaluation/<model>/``,
    ``logs/``, ``modules/`` (the exports' code as transformers imports it), ``phases/`` (one file for
    each finished phase, with its seconds), ``settings.json``, and the results: ``metrics.json`` and
    pictures.

    Attributes:
        lock: inside :meth:`opened`, a descriptor that keeps other quickstarts out; a process that
            inherits it keeps them out, too, for as long as it lives.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.prompts = root / "prompts" / "selection.jsonl"
        self.calibration = root / "prompts" / "calibration.jsonl"
        self.teacher = root / "checkpoints" / "teacher"
        self.lock = -1

    @contextlib.contextmanager
    def opened(self, settings: dict[str, Any], fresh: bool) -> Iterator[None]:
        """Make the folder, or go on with what is there; nobody else works in it meanwhile.

        Args:
            settings: what decides the results; kept in ``settings.json``.
            fresh: discard an earlier run first. What else is in the folder stays.

        Raises:
            HydraError: the folder holds a run with other settings, or something else, or another
                quickstart is at work in it.
        """
        if self.root.exists() and not self.root.is_dir():
            raise HydraError(f"--output {self.root} is a file: name a folder")
        self.root.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HydraError(
                    f"--output {self.root}: another quickstart is at work there; wait until it and "
                    "its students have ended, or name another folder"
                ) from None
            self._take_over({"format": FORMAT, **settings}, fresh)
            yield
        finally:
            os.close(self.lock)

    def _take_over(self, settings: dict[str, Any], fresh: bool) -> None:
        marker = self.root / "settings.json"
        if any(self.root.iterdir()):
            kept = self._kept_settings(marker)
            if fresh:
                self._clear()
            elif kept != settings:
                differing = next(k for k in {**kept, **settings} if kept.get(k) != settings.get(k))
                raise HydraError(
                    f"--output {self.root} holds a run with {differing} = {kept.get(differing)!r}, "
                    f"not {settings.get(differing)!r}: name another folder, or give --fresh"
                )
        for name in ("logs", "head_maps", "prompts"):
            (self.root / name).mkdir(exist_ok=True)
        write_json_atomic(marker, settings)

    def _kept_settings(self, marker: Path) -> dict[str, Any]:
        try:
            kept = json.loads(marker.read_text())
        except (OSError, ValueError):
            kept = None
        if not isinstance(kept, dict) or kept.get("format") != FORMAT:
            raise HydraError(
                f"--output {self.root} is not empty and holds no quickstart run (of this version): "
                "name another folder, or delete it yourself"
            )
        return kept

    def _clear(self) -> None:
        """Remove what a run writes, the marker last."""
        for name in _FOLDERS:
            if (self.root / name).is_dir():
                shutil.rmtree(self.root / name)
        for pattern in _FILES:
            for path in self.root.glob(pattern):
                path.unlink()

    def head_map(self, student: str) -> Path:
        """The student's head map."""
        return self.root / "head_maps" / f"{student}.json"

    def initial(self, student: str) -> Path:
        """The student before training, a Megatron checkpoint."""
        return self.root / "checkpoints" / student

    def run(self, student: str, stage: str) -> Path:
        """Output folder of one stage of training."""
        return self.root / "runs" / student / stage

    def export(self, student: str) -> Path:
        """The trained student in Hugging Face format."""
        return self.root / "exports" / student

    def evaluation(self, model: str) -> Path:
        """Results of ``teacher`` or a student."""
        return self.root / "evaluation" / model

    def log(self, student: str) -> Path:
        """What a student's process printed."""
        return self.root / "logs" / f"{student}.log"

    def modules(self, student: str) -> Path:
        """Where transformers copies the code of the student's export to, and imports it from."""
        return self.root / "modules" / student

    # -- phases -------------------------------------------------------------------------------

    def _phase_file(self, name: str) -> Path:
        return self.root / "phases" / f"{name}.json"

    def is_done(self, name: str) -> bool:
        """Whether phase ``name`` was finished, now or in an earlier run."""
        return self._phase_file(name).is_file()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[bool]:
        """Time a phase and note that it is finished.

        Yields:
            whether there is anything to do: False if the phase was finished before.
        """
        if self.is_done(name):
            yield False
            return
        path, stopped = self._phase_file(name), self._phase_file(name).with_suffix(".stopped")
        path.parent.mkdir(exist_ok=True)
        before = float(stopped.read_text()) if stopped.is_file() else 0.0
        started = time.monotonic()
        try:
            yield True
        except BaseException:
            write_text_atomic(stopped, f"{before + time.monotonic() - started:.2f}\n")
            raise
        seconds = round(before + time.monotonic() - started, 2)
        write_json_atomic(path, {"phase": name, "seconds": seconds})

    def seconds(self) -> dict[str, float]:
        """Phase → wall seconds of all finished phases, tries that were stopped included."""
        bodies = [json.loads(p.read_text()) for p in sorted((self.root / "phases").glob("*.json"))]
        return {body["phase"]: body["seconds"] for body in bodies}
