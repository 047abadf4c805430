"""The ``checkpoints`` folder of a run: names, which one to go on from, which ones may go."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from megatron_hydra.checkpoint import store
from megatron_hydra.errors import HydraError

_log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_STEP_PREFIX = "step_"
_DAMAGED_PREFIX = "damaged_"


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"{_STEP_PREFIX}{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first (unfinished ones have other names)."""
    found = folder.glob(f"{_STEP_PREFIX}[0-9]*") if folder.is_dir() else iter(())
    return sorted(path for path in found if path.is_dir())


def find_resume_point(folder: Path, resume: str) -> str | None:
    """The checkpoint to go on from, checked; ``None`` for a new run.

    What a death while saving left behind is removed.

    Args:
        folder: the run's ``checkpoints``; made if it is absent.
        resume: ``checkpoint.resume``.

    Raises:
        HydraError: there is one and ``resume`` is ``never``, or it is damaged.
    """
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(f".{_STEP_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folders = step_folders(folder)
    has_pointer = (folder / store.LATEST_FILE).exists()
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
            f"{error}; checkpoint.resume=fallback goes on from the newest undamaged checkpoint"
        ) from None
    return str(found)


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
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        doomed = path.with_name(f".{path.name}.old")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
