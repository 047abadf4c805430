"""Where a quickstart run keeps its files, and which of its phases are finished."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_hydra.checkpoint.atomic import write_text_atomic
from megatron_hydra.errors import HydraError

STUDENTS = ("hydra", "random", "all_gdn")
"""Selected heads; random heads at the same ratio; no full attention at all."""
STAGES = ("align", "distill", "finetune")


def shipped_teacher() -> Path:
    """The folder of the teacher that comes with the package (Hugging Face format)."""
    return Path(str(resources.files("megatron_hydra.quickstart").joinpath("shipped_teacher")))


class Workspace:
    """The output folder.

    Layout: ``prompts/``, ``head_maps/``, ``checkpoints/`` (the teacher and the students before
    training), ``runs/<student>/<stage>/``, ``exports/<student>/``, ``evaluation/<model>/``,
    ``logs/``, ``phases/`` (one file for each finished phase, with its seconds), ``settings.json``,
    and the results: ``metrics.json`` and pictures.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.prompts = root / "prompts" / "selection.jsonl"
        self.calibration = root / "prompts" / "calibration.jsonl"
        self.teacher = root / "checkpoints" / "teacher"

    def open(self, settings: dict[str, Any], fresh: bool) -> None:
        """Make the folder, or go on with what is there.

        Args:
            settings: what decides the results; kept in ``settings.json``.
            fresh: throw away an earlier run first.

        Raises:
            HydraError: the folder holds a run with other settings, or something else.
        """
        marker = self.root / "settings.json"
        if self.root.exists() and any(self.root.iterdir()):
            if not marker.is_file():
                raise HydraError(
                    f"--output {self.root} is not empty and holds no quickstart run: "
                    "name another folder"
                )
            if fresh:
                shutil.rmtree(self.root)
            elif (kept := json.loads(marker.read_text())) != settings:
                differing = next(k for k in {**kept, **settings} if kept.get(k) != settings.get(k))
                raise HydraError(
                    f"--output {self.root} holds a run with {differing} = {kept.get(differing)!r}, "
                    f"not {settings.get(differing)!r}: name another folder, or give --fresh"
                )
        self.root.mkdir(parents=True, exist_ok=True)
        for name in ("logs", "head_maps", "prompts"):
            (self.root / name).mkdir(exist_ok=True)
        write_text_atomic(marker, json.dumps(settings, indent=1) + "\n")

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
        started = time.monotonic()
        yield True
        path = self._phase_file(name)
        path.parent.mkdir(exist_ok=True)
        seconds = round(time.monotonic() - started, 2)
        write_text_atomic(path, json.dumps({"phase": name, "seconds": seconds}) + "\n")

    def seconds(self) -> dict[str, float]:
        """Phase → wall seconds of all finished phases."""
        bodies = [json.loads(p.read_text()) for p in sorted((self.root / "phases").glob("*.json"))]
        return {body["phase"]: body["seconds"] for body in bodies}
