"""Inputs of tokenization: files and Hub data sets, cut into units that are read independently.

A unit is a stretch of an input that one process reads from start to end: a byte range of a JSONL
file, a row group of a Parquet file, rows of an Arrow file, one shard of a streamed data set. The
list of units depends on the inputs and on nothing else, and the rows of all units in order are the
rows of the inputs in order.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from pathlib import Path
from typing import Any, Literal

from megatron_hydra.data.manifest import file_probe
from megatron_hydra.errors import HydraError

Format = Literal["jsonl", "parquet", "arrow", "text", "lines"]
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
# What the datasets library writes beside its files to describe them.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Where rows come from.

    Attributes:
        inputs: files, folders or glob patterns; or one Hub data set (or local folder) with ``hub``.
        format: of the files; ``None``: by suffix. ``text``: a file is a document; ``lines``: a
            line is. Of a folder, only files of this format are read.
        column: the field that holds the text, or the list of messages with ``chat``.
        chat: rows are conversations.
        hub: ``inputs`` is a data set for ``datasets.load_dataset``.
        config_name, split, revision: its configuration, split and git revision.
        commits: the git commit of each of ``inputs``, once
            :func:`megatron_hydra.data.hub.pin_revisions` has looked it up.
        streaming: read it file by file from the Hub without keeping it on disk.
        unit_bytes: size of a unit of a JSONL or lines file, in bytes; about so much of an Arrow
            file, too.
    """

    inputs: tuple[str, ...]
    format: Format | None = None
    column: str = "text"
    chat: bool = False
    hub: bool = False
    config_name: str | None = None
    split: str = "train"
    revision: str | None = None
    commits: tuple[str | None, ...] = ()
    streaming: bool = False
    unit_bytes: int = 8 << 20


@dataclasses.dataclass(frozen=True)
class Unit:
    """A stretch of an input.

    Attributes:
        path: file, or data set.
        kind: how to read it.
        begin, end: bytes, rows, row-group or shard numbers, as ``kind`` says; end exclusive.
        size: bytes, or what else stands for the work in it; for progress.
    """

    path: str
    kind: Literal["jsonl", "lines", "text", "compressed", "parquet", "arrow", "stream"]
    begin: int
    end: int
    size: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: its text or messages, or what is wrong with it.

    Attributes:
        where: file and byte, row or line, for messages.
        value: text, or a list of messages; ``None`` for a bad row.
        error: what is wrong.
    """

    where: str
    value: Any
    error: str = ""


def plan_units(corpus: CorpusConfig) -> list[Unit]:
    """All units of the corpus, in order.

    Raises:
        HydraError: an input is missing, empty, or of no known format.
    """
    if corpus.hub:
        from megatron_hydra.data.hub import hub_units

        return hub_units(corpus)
    units: list[Unit] = []
    for path in _expand(corpus):
        if os.path.getsize(path) == 0:
            raise HydraError(f"{path} is empty (0 bytes); leave it out or repair it")
        own = _file_units(path, corpus)
        if not own:
            raise HydraError(f"{path} is empty (a table without rows); leave it out or repair it")
        units += own
    return units


def input_identity(corpus: CorpusConfig) -> list[dict[str, Any]]:
    """What tells the inputs from others, for the manifest.

    A file goes by name, size and a hash of 64 blocks; a Hub data set by name and commit (the
    revision that was asked for, if the commit could not be looked up).
    """
    if corpus.hub:
        fixed = {k: getattr(corpus, k) for k in ("config_name", "split", "streaming")}
        commits = corpus.commits or (corpus.revision,) * len(corpus.inputs)
        return [
            {"dataset": name, "revision": commit, **fixed}
            for name, commit in zip(corpus.inputs, commits, strict=True)
        ]
    return [
        {"file": os.path.basename(p), "bytes": os.path.getsize(p), "probe": file_probe(p)}
        for p in _expand(corpus)
    ]


def _expand(corpus: CorpusConfig) -> list[str]:
    """Files of the inputs, in the order given, folders and patterns sorted."""
    paths: list[str] = []
    for name in corpus.inputs:
        if os.path.isdir(name):
            found = _files_of_folder(Path(name), corpus.format)
        elif glob.has_magic(name) and not os.path.exists(name):
            found = sorted(p for p in glob.glob(name, recursive=True) if os.path.isfile(p))
        else:
            found = [name] if os.path.isfile(name) else []
        if not found:
            raise HydraError(
                f"--input {name}: no such file, or a folder or pattern without data files "
                f"({', '.join(sorted(_SUFFIXES))}); for a Hub data set use --dataset"
            )
        paths += found
    return paths


def _files_of_folder(folder: Path, wanted: Format | None) -> list[str]:
    """Data files of a folder and of the folders in it, sorted; hidden ones are left out.

    Raises:
        HydraError: they have several formats and none is wanted. One of them is likely no data,
            such as the README.md beside a data set's Parquet files.
    """
    examples: dict[Format, str] = {}
    found = []
    for path in sorted(folder.rglob("*")):
        kind = format_of(str(path))
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if kind is None or hidden or path.name in _DESCRIPTIONS or not path.is_file():
            continue
        if wanted is None or kind == ("text" if wanted == "lines" else wanted):
            examples.setdefault(kind, str(path))
            found.append(str(path))
    if len(examples) > 1:
        shown = ", ".join(f"{path} ({kind})" for kind, path in examples.items())
        raise HydraError(
            f"--input {folder} holds files of several formats: {shown}; choose one with --format, "
            "or give files or a pattern"
        )
    return found


def format_of(path: str) -> Format | None:
    """The format that a file's suffix stands for."""
    stem, suffix = os.path.splitext(path)
    if suffix in COMPRESSED:
        suffix = os.path.splitext(stem)[1]
    return _SUFFIXES.get(suffix)


def _file_units(path: str, corpus: CorpusConfig) -> list[Unit]:
    kind = corpus.format or format_of(path)
    size = os.path.getsize(path)
    if kind is None:
        raise HydraError(f"{path}: unknown suffix; say what it is with --format")
    if path.endswith(COMPRESSED) and kind in ("jsonl", "lines"):
        return [Unit(path, "compressed", 0, size, size)]
    if kind == "text":
        return [Unit(path, "text", 0, size, size)]
    if kind in ("jsonl", "lines"):
        starts = range(0, size, corpus.unit_bytes)
        ends = [min(start + corpus.unit_bytes, size) for start in starts]
        return [Unit(path, kind, a, b, b - a) for a, b in zip(starts, ends, strict=True)]
    try:
        return _parquet_units(path) if kind == "parquet" else arrow_units(path, corpus)
    except (OSError, ValueError) as error:
        raise HydraError(f"{path}: cannot be opened as {kind}: {error}") from error


def _parquet_units(path: str) -> list[Unit]:
    import pyarrow.parquet

    metadata = pyarrow.parquet.ParquetFile(path).metadata
    if metadata.num_rows == 0:
        return []
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    return [Unit(path, "parquet", i, i + 1, size) for i, size in enumerate(sizes)]


def arrow_units(path: str, corpus: CorpusConfig) -> list[Unit]:
    """Units of an Arrow file; none if it has no rows."""
    from datasets import Dataset

    rows = len(Dataset.from_file(path))
    size = os.path.getsize(path)
    step = max(1, rows * corpus.unit_bytes // max(size, 1))
    spans = [(a, min(a + step, rows)) for a in range(0, rows, step)]
    return [Unit(path, "arrow", a, b, size * (b - a) // rows) for a, b in spans]
