"""Output folder of a run: lock it, find the checkpoint to resume from, delete old checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_hydra.checkpoint import store
from megatron_hydra.errors import HydraError
from megatron_hydra.reporting import EVENTS_FILE

_log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_STEP_PREFIX = "step_"
_DAMAGED_PREFIX = "damaged_"
_LOCK = ".lock"


@contextlib.contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """Create the output folder and lock it, so that no second run writes the same files.

    The lock is released when the process ends, for any reason.

    Raises:
        HydraError: another process holds the lock.
    """
    output.mkdir(parents=True, exist_ok=True)
    with open(output / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HydraError(
                f"{output} is in use by another run that has not ended: choose another output, or "
                "end that run first"
            ) from None
        except OSError as error:  # some network file systems have no locks
            _log.warning("%s cannot be locked (%s): do not start a second run there", output, error)
        yield


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"{_STEP_PREFIX}{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first (unfinished ones have other names)."""
    found = folder.glob(f"{_STEP_PREFIX}[0-9]*") if folder.is_dir() else iter(())
    return sorted(path for path in found if path.is_dir())


def find_resume_point(folder: Path, resume: str) -> str | None:
    """Find and verify the checkpoint to resume from; ``None`` for a new run.

    Unfinished checkpoints of a process that was killed during a save are removed.

    Args:
        folder: the run's ``checkpoints``; created if missing.
        resume: ``checkpoint.resume``.

    Raises:
        HydraError: a checkpoint exists and ``resume`` is ``never``; the checkpoint is damaged; or all
            checkpoints are missing although the run has saved one.
    """
    folders = step_folders(folder)
    has_pointer = (folder / store.LATEST_FILE).exists()
    if not folders and not has_pointer:
        _check_no_lost_checkpoints(folder)
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(f".{_STEP_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not folders and not has_pointer:
        return None
    if resume == "never":
        raise HydraError(
            f"{folder} already holds checkpoints and checkpoint.resume is 'never': choose "
            "another output, or set checkpoint.resume=auto to resume"
        )
    if resume == "fallback":
        return str(_newest_good(folders))
    try:
        # Without a pointer, the first save was interrupted after its folder was complete.
        found = store.resolve_checkpoint(folder) if has_pointer else folders[-1]
        store.verify_checkpoint(found)
    except HydraError as error:
        raise HydraError(
            f"{error}; checkpoint.resume=fallback resumes from the newest undamaged checkpoint"
        ) from None
    return str(found)


def _check_no_lost_checkpoints(folder: Path) -> None:
    """Fail if the checkpoints of a run are missing (unmounted disk), instead of a silent restart."""
    events = folder.parent / EVENTS_FILE
    if not events.is_file():
        return
    for line in reversed(events.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            event = json.loads(line)
        except ValueError:  # half-written when the process was killed
            continue
        if isinstance(event, dict) and event.get("event") == "save":
            raise HydraError(
                f"{folder} holds no checkpoint, but {events} says that {event['checkpoint']} was "
                "saved there: mount or restore the folder; to start again, choose another output or "
                f"remove {folder.parent}"
            )


def _newest_good(folders: list[Path]) -> Path:
    """Find the newest undamaged checkpoint; newer, damaged ones are renamed, so that retention ignores them."""
    damaged = []
    for folder in reversed(folders):
        try:
            store.verify_checkpoint(folder)
        except HydraError as error:
            _log.warning("%s", error)
            damaged.append(folder)
            continue
        for path in damaged:
            aside = path.with_name(_DAMAGED_PREFIX + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            _log.warning(
                "%s is damaged and was renamed to %s; delete it after inspection", path, aside.name
            )
        return folder
    raise HydraError(f"all {len(folders)} checkpoints of this run are damaged")


def retain(folder: Path, newest: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints (0: none), and never ``newest``."""
    old = [path for path in step_folders(folder) if path != newest]
    for path in old[: max(0, len(old) + 1 - keep)] if keep else []:
        discard(path)


def discard(path: Path) -> None:
    """Rename a checkpoint, then delete it: a half-deleted folder must not look like a checkpoint."""
    doomed = path.with_name(f".{path.name}.old")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
