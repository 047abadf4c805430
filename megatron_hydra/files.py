"""Files: atomic writes, reads with errors that name the file, hashes and headers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_hydra.errors import HydraError

# -- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a temporary file beside ``path``, which gets its name when the block ends without an error.

    File and folder are synced: after a crash or a power cut, a reader finds the old file or the new one. On any
    exception the temporary file is removed and ``path`` does not change. A missing folder is created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, "tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """:func:`atomic_file` with this text, in UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_figure_atomic(figure: Any, path: str | os.PathLike[str], dpi: int) -> Path:
    """:func:`atomic_file` with a matplotlib figure as PNG; returns the path."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    return Path(path)


def write_json_atomic(path: str | os.PathLike[str], body: Any) -> None:
    """:func:`atomic_file` with this object as indented JSON."""
    write_text_atomic(path, json.dumps(body, indent=1) + "\n")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Fill a temporary folder beside ``path``, which gets its name when the block ends without an error.

    On any exception the temporary folder is removed and ``path`` does not change.

    Args:
        path: the folder to make.
        force: replace an existing folder; it is removed only when the new one is complete.

    Raises:
        HydraError: ``path`` exists and ``force`` is not given.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not force:
        raise HydraError(f"{path} exists already; choose another output, or --force to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        _take_over(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sibling(path: Path, kind: str) -> Path:
    """A hidden name beside ``path`` that no other process or machine uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.{kind}")


def _take_over(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    # A rename cannot replace a folder: the old one is renamed first, and back if the second rename fails.
    aside = _sibling(path, "old")
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


# -- reading -------------------------------------------------------------------------------------


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        HydraError: the file is missing, unreadable, or no JSON object.
    """
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HydraError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HydraError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise HydraError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise HydraError(f"{path} must hold a JSON object")
    return body


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's content, as from ``sha256sum``."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class JsonFormat:
    """The header of a kind of JSON file: its keys ``format`` and ``version``.

    Attributes:
        name: the value of ``format``.
        version: that this release writes and reads.
        title: name of such a file in messages.
        advice: for the message: what to do about a file of another version.
    """

    name: str
    version: int
    title: str
    advice: str = ""

    def add_header(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """``body``, with the two keys before its own keys."""
        return {"format": self.name, "version": self.version, **body}

    def without_header(self, body: Any, source: str | os.PathLike[str]) -> dict[str, Any]:
        """Inverse of :meth:`add_header`.

        Args:
            body: the parsed file.
            source: its origin, for messages.

        Raises:
            HydraError: it is not an object, or has another format or version.
        """
        if not isinstance(body, Mapping) or body.get("format") != self.name:
            raise HydraError(
                f"{source} is not a {self.title}: its key 'format' is not {self.name!r}"
            )
        if body.get("version") != self.version:
            advice = f"; {self.advice}" if self.advice else ""
            raise HydraError(
                f"{source}: {self.title} version {body.get('version')!r} is not supported "
                f"(this release reads version {self.version}){advice}"
            )
        return {key: value for key, value in body.items() if key not in ("format", "version")}

    def read(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """:func:`read_json` and :meth:`without_header`."""
        return self.without_header(read_json(path), path)
