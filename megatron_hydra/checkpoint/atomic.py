"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_hydra.errors import HydraError


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Fill a temporary sibling of ``path``, which takes its name when the block ends well.

    On any exception the sibling is removed and ``path`` is as it was before.

    Args:
        path: the folder to make.
        force: replace an existing folder; the old one goes only when the new one is complete.

    Raises:
        HydraError: ``path`` exists and ``force`` is not given.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not force:
        raise HydraError(f"{path} exists already; choose another output, or --force to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        _take_over(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_over(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    # A folder cannot be replaced by rename: the old one steps aside, and back if that fails.
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        aside.rename(path)
        raise
    if aside.is_dir():
        shutil.rmtree(aside)
    else:
        aside.unlink()


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write a small file so that it is never seen half-written, also not after a power cut."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """:func:`sync` for everything in a folder and for the folder itself."""
    folder = Path(folder)
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)
