"""List an input folder: its data files, and the skipped files with their reasons.

No file in a folder is skipped silently: a file is read, or it is skipped with a reason, or it is an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_hydra.errors import HydraError

Format = Literal["jsonl", "parquet", "arrow", "text", "lines"]
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
"""Suffix → pyarrow's name of the compression."""
_OTHER_COMPRESSIONS = (
    ".xz", ".lzma", ".zip", ".7z", ".rar", ".tar", ".tgz", ".br", ".snappy", ".z",
)  # fmt: skip

_SPLITS, _STATE = "dataset_dict.json", "state.json"
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", _SPLITS, _STATE)
"""Files that the datasets library writes to describe its data files."""
_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Listing:
    """Files below a folder.

    Attributes:
        files: the data files, sorted.
        left_out: (path, reason) of all other files, sorted.
    """

    files: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """Numbers of skipped files by reason, with a few names."""
        reasons: dict[str, list[str]] = {}
        for path, why in self.left_out:
            reasons.setdefault(why, []).append(path)
        parts = []
        for why, paths in reasons.items():
            shown = ", ".join(paths[:_EXAMPLES]) + (", …" if len(paths) > _EXAMPLES else "")
            parts.append(f"{len(paths)} {why} ({shown})")
        return "; ".join(parts)


def format_of(path: str) -> Format | None:
    """The format of a file by its suffix, in upper or lower case."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSED:
        suffix = os.path.splitext(stem)[1]
    return SUFFIXES.get(suffix)


def compression_of(path: str) -> str | None:
    """Pyarrow's name of a file's compression, by its suffix; ``None`` if not compressed."""
    return COMPRESSED.get(os.path.splitext(path.lower())[1])


def refuse_compression(path: str) -> None:
    """Check that the compression of a file is supported.

    Raises:
        HydraError: it is not; names it and the supported ones.
    """
    stem, suffix = os.path.splitext(path.lower())
    if suffix in _OTHER_COMPRESSIONS and (
        SUFFIXES.get(os.path.splitext(stem)[1]) or suffix == ".tgz"
    ):
        raise HydraError(
            f"{path}: files with the suffix {suffix} cannot be read; unpack it, or compress with one of "
            f"{', '.join(COMPRESSED)}"
        )


def list_folder(folder: Path, wanted: Format | None) -> Listing:
    """All data files of a folder and its subfolders; links are followed.

    In a data set saved by the datasets library, only the files named in ``state.json`` are data. Its cache
    files (of ``map``, ``filter``, ``sort``) are skipped.

    Args:
        folder: an input.
        wanted: only files of this format; ``None``: all formats.

    Raises:
        HydraError: the files have several formats and ``wanted`` is None (one format is probably no data,
            such as the README.md of a data set of Parquet files); a link has no target; a folder cannot
            be read; a compression is unknown; or it is a saved data set with several splits.
    """
    files: list[str] = []
    left_out: list[tuple[str, str]] = []
    examples: dict[Format, str] = {}
    for parent, names in _walk(folder):
        saved = _saved_files(Path(parent))
        for name in names:
            path = os.path.join(parent, name)
            why = _skip_reason(path, folder, wanted, saved)
            if why:
                left_out.append((path, why))
                continue
            kind = format_of(path)
            assert kind is not None
            examples.setdefault(kind, path)
            files.append(path)
    if len(examples) > 1:
        shown = ", ".join(f"{path} ({kind})" for kind, path in examples.items())
        raise HydraError(
            f"--input {folder} holds files of several formats: {shown}; choose one with --format, "
            "or give files or a pattern"
        )
    return Listing(tuple(sorted(files, key=Path)), tuple(sorted(left_out)))


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, names of its files). Links are followed, and each real folder is visited once."""

    def unreadable(error: OSError) -> None:
        raise HydraError(f"--input {folder}: {error.filename} cannot be read: {error.strerror}")

    seen = set()
    for parent, below, names in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a parent, or a second link to the same folder
            below.clear()
            continue
        seen.add(real)
        below.sort()
        if _SPLITS in names:
            splits = [name for name in below if os.path.exists(os.path.join(parent, name, _STATE))]
            if len(splits) > 1:
                raise HydraError(
                    f"--input {parent} is a saved data set with the splits {', '.join(splits)}: give the "
                    f"folder of one, --input {os.path.join(parent, splits[0])}"
                )
        yield parent, sorted(names)


def _saved_files(parent: Path) -> set[str] | None:
    """Names of the data files of a saved data set; ``None`` if the folder is not a saved data set."""
    try:
        state = json.loads((parent / _STATE).read_text())
        return {entry["filename"] for entry in state["_data_files"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # another program's state.json


def _skip_reason(path: str, folder: Path, wanted: Format | None, saved: set[str] | None) -> str:
    """Reason for skipping a file; empty if it is data.

    Raises:
        HydraError: a link has no target, or a compression is unknown.
    """
    name = os.path.basename(path)
    if any(part.startswith(".") for part in Path(path).relative_to(folder).parts):
        return "hidden"
    if not os.path.exists(path):
        raise HydraError(
            f"--input {folder}: {path} is a link to {os.readlink(path)}, which does not exist"
        )
    if not os.path.isfile(path):
        return "no regular file"
    if name in _DESCRIPTIONS:
        return "descriptions of a data set"
    refuse_compression(path)
    kind = format_of(path)
    if kind is None:
        return "of no known format"
    if saved is not None and kind == "arrow" and name not in saved:
        return "caches of the datasets library"
    if wanted is not None and kind != ("text" if wanted == "lines" else wanted):
        return f"not {wanted}"
    return ""


def repeated(paths: Sequence[str]) -> list[tuple[str, str]]:
    """(first path, later path) pairs of the same file."""
    first: dict[str, str] = {}
    pairs = []
    for path in paths:
        real = os.path.realpath(path)
        if real in first:
            pairs.append((first[real], path))
        first.setdefault(real, path)
    return pairs
