"""Where finished steps are kept, and who is computing one now.

<root>/steps/<kind>-<key>/out/         what the step made
                         record.json   that it is finished, with its inputs and seconds
                         log.txt       what it printed
                         failed.json   how its last try ended, if it failed
                         claim.json    the process that is computing it
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_hydra
from megatron_hydra.checkpoint.atomic import write_text_atomic
from megatron_hydra.errors import HydraError
from megatron_hydra.experiments import fingerprint
from megatron_hydra.experiments.plan import Step

_HEARTBEAT_SECONDS = 10.0
_STALE_SECONDS = 120.0
MARKER = "hydra-experiments.json"


class StepStore:
    """The steps under one folder. Several processes, on several machines, may share it.

    Args:
        root: made if it does not exist.

    Raises:
        HydraError: the folder holds something else.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        marker = self.root / MARKER
        if not marker.is_file():
            if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
                raise HydraError(f"--output {root} is not empty and holds no experiments")
            self.root.mkdir(parents=True, exist_ok=True)
            write_text_atomic(marker, json.dumps({"format": "hydra-experiments"}) + "\n")

    def folder(self, step: Step) -> Path:
        """All files of a step."""
        return self.root / "steps" / f"{step.kind}-{step.key}"

    def out(self, step: Step) -> Path:
        """What the step makes."""
        return self.folder(step) / "out"

    def log(self, step: Step) -> Path:
        """What it printed."""
        return self.folder(step) / "log.txt"

    def is_done(self, step: Step) -> bool:
        """Whether it is finished."""
        return (self.folder(step) / "record.json").is_file()

    def record(self, step: Step) -> dict[str, Any] | None:
        """``record.json`` of a finished step."""
        return _json(self.folder(step) / "record.json")

    def failure(self, step: Step) -> dict[str, Any] | None:
        """``failed.json`` of a step whose last try failed."""
        return None if self.is_done(step) else _json(self.folder(step) / "failed.json")

    def finish(self, step: Step, seconds: float, cpu_seconds: float = 0.0) -> None:
        """Note that a step is finished, and its time: on the clock, and of the process's CPUs."""
        body = {
            **{k: v for k, v in dataclasses.asdict(step).items() if k != "places"},
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "host": socket.gethostname(),
            "package_version": megatron_hydra.__version__,
            "package_source": fingerprint.of_package(),
        }
        self.folder(step).mkdir(parents=True, exist_ok=True)
        (self.folder(step) / "failed.json").unlink(missing_ok=True)
        write_text_atomic(self.folder(step) / "record.json", json.dumps(body, indent=1) + "\n")

    def fail(self, step: Step, message: str) -> None:
        """Note how a try ended."""
        folder = self.folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        body = {"error": message, "log": str(self.log(step))}
        write_text_atomic(folder / "failed.json", json.dumps(body, indent=1) + "\n")

    def seconds_by_kind(self) -> dict[str, float]:
        """Median seconds of the finished steps of each kind."""
        seconds: dict[str, list[float]] = {}
        for path in (self.root / "steps").glob("*/record.json"):
            body = _json(path)
            if body:
                seconds.setdefault(body["kind"], []).append(body["seconds"])
        return {kind: statistics.median(values) for kind, values in seconds.items()}

    @contextlib.contextmanager
    def claimed(self, step: Step) -> Iterator[bool]:
        """Be the only one to compute a step.

        Waits while another process does; yields whether there is anything left to do.
        """
        path = self.folder(step) / "claim.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        while not (mine := _try_claim(path)) and not self.is_done(step):
            time.sleep(0.5)
        if not mine:
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
        beat.start()
        try:
            yield not self.is_done(step)
        finally:
            stop.set()
            beat.join()
            path.unlink(missing_ok=True)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, json.JSONDecodeError) as error:
        raise HydraError(
            f"{path} cannot be read ({error}): delete its folder and run again"
        ) from None


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _try_claim(path: Path) -> bool:
    """Make the claim's file, or take over that of a process that is gone."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        if _is_abandoned(path):
            # Of several that see this, one renames it away; then all try again.
            aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
            with contextlib.suppress(FileNotFoundError):
                path.rename(aside)
                aside.unlink()
        return False
    with os.fdopen(descriptor, "w") as file:
        json.dump(_me(), file)
    return True


def _is_abandoned(path: Path) -> bool:
    try:
        age = time.time() - path.stat().st_mtime
        owner = json.loads(path.read_text() or "{}")
    except FileNotFoundError:
        return False
    except json.JSONDecodeError:
        owner = {}
    if owner.get("host") == socket.gethostname():
        return not _is_alive(int(owner["pid"]))
    return age > _STALE_SECONDS


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_HEARTBEAT_SECONDS):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
