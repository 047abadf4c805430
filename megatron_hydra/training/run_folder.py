"""The folder of a run: whose it is; its checkpoints, which one to resume from, which ones may go."""

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
    """Make a run's folder and keep it for this process: two runs would spoil each other's files.

    The lock goes with the process, however that ends.

    Raises:
        HydraError: another process has it.
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
            _log.warning("%s cannot be locked (%s): start no second run there", output, error)
        yield


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"{_STEP_PREFIX}{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first (unfinished ones have other names)."""
    found = folder.glob(f"{_STEP_PREFIX}[0-9]*") if folder.is_dir() else iter(())
    return sorted(path for path in found if path.is_dir())


def find_resume_point(folder: Path, resume: str) -> str | None:
    """The checkpoint to resume from, checked; ``None`` for a new run.

    What a death while saving left behind is removed.

    Args:
        folder: the run's ``checkpoints``; made if it is absent.
        resume: ``checkpoint.resume``.

    Raises:
        HydraError: there is one and ``resume`` is ``never``, or it is damaged; or there is none, but
            the run has saved one.
    """
    folders = step_folders(folder)
    has_pointer = (folder / store.LATEST_FILE).exists()
    if not folders and not has_pointer:
        _refuse_lost_checkpoints(folder)
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(f".{_STEP_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not folders and not has_pointer:
        return None
    if resume == "never":
        raise HydraError(
            f"{folder} already holds checkpoints and checkpoint.resume is 'never': choose "
            "another output, or checkpoint.resume=auto to go on"
        )
    if resume == "fallback":
        return str(_newest_good(folders))
    try:
        # Without a pointer the first save was interrupted after its folder was complete.
        found = store.resolve_checkpoint(folder) if has_pointer else folders[-1]
        store.verify_checkpoint(found)
    except HydraError as error:
        raise HydraError(
            f"{error}; checkpoint.resume=fallback resumes from the newest undamaged checkpoint"
        ) from None
    return str(found)


def _refuse_lost_checkpoints(folder: Path) -> None:
    """A run whose checkpoints are gone (an unmounted disk) must not silently start again."""
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
    """The newest undamaged checkpoint; newer ones are set aside, out of the way of retention."""
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
            _log.warning("%s is set aside as %s: delete it when you have looked", path, aside.name)
        return folder
    raise HydraError(f"none of the {len(folders)} checkpoints in this run's folder is undamaged")


def retain(folder: Path, newest: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints (0: none), and never ``newest``."""
    old = [path for path in step_folders(folder) if path != newest]
    for path in old[: max(0, len(old) + 1 - keep)] if keep else []:
        discard(path)


def discard(path: Path) -> None:
    """Delete a checkpoint, renamed first: a half-deleted folder must not look like one."""
    doomed = path.with_name(f".{path.name}.old")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
