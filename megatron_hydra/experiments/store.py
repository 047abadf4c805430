"""Store of finished steps, with claims of the processes that compute a step.

<root>/steps/<kind>-<key>/out/         output of the step
                         record.json   shows that it is finished; has its inputs and seconds
                         log.txt       its printed output
                         failed.json   error of its last try, if it failed
                         stopped.json  seconds of the tries that were stopped
                         without_weights   (empty) its output is here without weights
                         claim.json    the process that computes it
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments import fingerprint
from megatron_hydra.experiments.plan import Step
from megatron_hydra.files import write_json_atomic
from megatron_hydra.version import __version__

WITHOUT_WEIGHTS = "without_weights"
_HEARTBEAT_SECONDS = 10.0
_STALE_SECONDS = 120.0
MARKER = "hydra-experiments.json"


def _say(line: str) -> None:
    print(line, flush=True)


class StepStore:
    """The steps under one folder. Several processes, on several machines, may share it.

    Args:
        root: created if it does not exist.

    Raises:
        HydraError: the folder has other contents.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        marker = self.root / MARKER
        if not marker.is_file():
            if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
                raise HydraError(
                    f"--output {root} is not empty and has no experiments (of this version): name "
                    "another folder, or delete it yourself"
                )
            self.root.mkdir(parents=True, exist_ok=True)
            write_json_atomic(marker, {"format": "hydra-experiments"})

    def folder(self, step: Step) -> Path:
        """The folder of a step."""
        return self.root / "steps" / f"{step.kind}-{step.key}"

    def out(self, step: Step) -> Path:
        """The folder of the step's output."""
        return self.folder(step) / "out"

    def log(self, step: Step) -> Path:
        """The file of its printed output."""
        return self.folder(step) / "log.txt"

    def is_done(self, step: Step) -> bool:
        """Whether it is finished."""
        return (self.folder(step) / "record.json").is_file()

    def is_whole(self, step: Step) -> bool:
        """Whether it is finished and other steps can read all its output."""
        return self.is_done(step) and not (self.folder(step) / WITHOUT_WEIGHTS).exists()

    def discard_leftovers(self, step: Step) -> None:
        """Delete the files of a step that was copied without weights."""
        marker = self.folder(step) / WITHOUT_WEIGHTS
        if marker.exists():
            shutil.rmtree(self.out(step), ignore_errors=True)
            (self.folder(step) / "record.json").unlink(missing_ok=True)
            marker.unlink()

    def record(self, step: Step) -> dict[str, Any] | None:
        """``record.json`` of a finished step."""
        return _json(self.folder(step) / "record.json")

    def failure(self, step: Step) -> dict[str, Any] | None:
        """``failed.json`` of a step whose last try failed."""
        return None if self.is_done(step) else _json(self.folder(step) / "failed.json")

    def stop(self, step: Step, seconds: float, cpu_seconds: float) -> None:
        """Record the seconds of a stopped try. The next try continues, and they count for the step."""
        write_json_atomic(
            self.folder(step) / "stopped.json", self._seconds(step, seconds, cpu_seconds)
        )

    def _seconds(self, step: Step, seconds: float, cpu_seconds: float) -> dict[str, float]:
        """The seconds of this try and of stopped tries before it."""
        before = _json(self.folder(step) / "stopped.json") or {}
        spent = {"seconds": seconds, "cpu_seconds": cpu_seconds}
        return {name: round(before.get(name, 0.0) + value, 2) for name, value in spent.items()}

    def finish(self, step: Step, seconds: float, cpu_seconds: float = 0.0) -> None:
        """Record that a step is finished, with its wall-clock and CPU seconds of this try."""
        body = {
            **{k: v for k, v in dataclasses.asdict(step).items() if k not in ("places", "row")},
            **self._seconds(step, seconds, cpu_seconds),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "host": socket.gethostname(),
            "package_version": __version__,
            "package_source": fingerprint.of_package(),
        }
        self.folder(step).mkdir(parents=True, exist_ok=True)
        (self.folder(step) / "failed.json").unlink(missing_ok=True)
        write_json_atomic(self.folder(step) / "record.json", body)
        (self.folder(step) / "stopped.json").unlink(missing_ok=True)

    def fail(self, step: Step, message: str) -> None:
        """Record how a failed attempt ended."""
        folder = self.folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        body = {"error": message, "log": str(self.log(step))}
        write_json_atomic(folder / "failed.json", body)

    def forget_failure(self, step: Step) -> None:
        """Forget a failed attempt, because the step will be tried again."""
        (self.folder(step) / "failed.json").unlink(missing_ok=True)

    def discard(self, steps: Iterable[Step]) -> None:
        """Delete steps, finished or not, so that they are computed again.

        Raises:
            HydraError: a process is computing one of them; none is deleted.
        """
        folders = [folder for step in steps if (folder := self.folder(step)).exists()]
        for folder in folders:
            claim = folder / "claim.json"
            if (owner := _owner(claim)) and _abandoned(claim) is None:
                raise HydraError(
                    f"{folder}: process {owner} is computing this step; wait for it or end it first"
                )
        for folder in folders:
            doomed = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)  # a partly deleted step must not look finished
            shutil.rmtree(doomed, ignore_errors=True)

    def seconds_by_kind(self) -> dict[str, float]:
        """Median seconds of the finished steps of each kind."""
        seconds: dict[str, list[float]] = {}
        for path in (self.root / "steps").glob("*/record.json"):
            body = _json(path)
            if body:
                seconds.setdefault(body["kind"], []).append(body["seconds"])
        return {kind: statistics.median(values) for kind, values in seconds.items()}

    @contextlib.contextmanager
    def claimed(self, step: Step, say: Callable[[str], None] = _say) -> Iterator[bool]:
        """Claim a step, so that no other process computes it.

        Waits while another process computes it, which ``say`` reports once; yields whether it must still be
        computed.
        """
        path = self.folder(step) / "claim.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        waiting = False
        while (mine := _try_claim(path)) is None and not self.is_whole(step):
            if not waiting and (owner := _owner(path)):
                say(f"waiting for {step.title}: process {owner} is computing it")
                waiting = True
            time.sleep(0.5)
        if mine is None:
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, mine, stop), daemon=True)
        beat.start()
        try:
            yield not self.is_whole(step)
        finally:
            stop.set()
            beat.join()
            if _text(path) == mine:
                path.unlink(missing_ok=True)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise HydraError(
            f"{path} cannot be read ({error}): delete its folder and run again"
        ) from None


def _try_claim(path: Path) -> str | None:
    """Create the claim's file and return its text, or remove the claim of a process that has ended."""
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "claim": uuid.uuid4().hex})
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        if (abandoned := _abandoned(path)) is not None:
            _remove_abandoned_claim(path, abandoned)
        return None
    with os.fdopen(descriptor, "w") as file:
        file.write(mine)
    return mine


def _abandoned(path: Path) -> str | None:
    """The text of a claim whose process has ended or become silent; ``None``: the claim is active.

    If a process of this machine has ended, this is known at once. If it runs, it may be another process with
    the same id, so its claim must also be renewed regularly.
    """
    try:
        age = time.time() - path.stat().st_mtime
        text = path.read_text()
    except FileNotFoundError:
        return None
    owner = _parsed(text)
    ended = owner.get("host") == socket.gethostname() and not _is_alive(int(owner["pid"]))
    return text if ended or age > _STALE_SECONDS else None


def _remove_abandoned_claim(path: Path, abandoned: str) -> None:
    """Remove an abandoned claim. One of several processes removes it, and all try again."""
    aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if aside.read_text() != abandoned:
            # Another process was faster, and this is its new claim: restore it.
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _owner(path: Path) -> str:
    """The owner of a claim, for a message; ``""`` without a claim."""
    owner = _parsed(_text(path))
    return f"{owner['pid']} on {owner['host']}" if owner else ""


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _parsed(text: str) -> dict[str, Any]:
    """A claim's facts; none during its writing."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _beat(path: Path, mine: str, stop: threading.Event) -> None:
    """Renew the claim, as long as it is this process's."""
    while not stop.wait(_HEARTBEAT_SECONDS) and _text(path) == mine:
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
