"""Inputs of tokenization: files and Hub data sets, split into units that are read independently.

A unit is a part of an input that one process reads from start to end: a byte range of a JSONL file, a row
group of a Parquet file, rows of an Arrow file, or one shard of a streamed data set. The list of units depends
only on the inputs. The rows of all units in order are the rows of the inputs in order.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from pathlib import Path
from typing import Any, Literal

from megatron_hydra.data.folder import (
    SUFFIXES,
    Format,
    Listing,
    list_folder,
)
from megatron_hydra.data.manifest import file_probe
from megatron_hydra.errors import HydraError
from megatron_hydra.options import option


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Source of the rows.

    Attributes:
        inputs: files, folders or glob patterns; or one Hub data set (or local folder) with ``hub``.
        format: format of the files; ``None``: by suffix. ``text``: one document per file; ``lines``: one
            per line. In a folder, only files of this format are read.
        column: the field with the text, or with the list of messages if ``chat``.
        chat: rows are conversations.
        tools_column: the field with the tools of a conversation, as a list or as JSON; ``None``: no tools.
        hub: ``inputs`` is a data set for ``datasets.load_dataset``.
        config_name, split, revision: its configuration, split and git revision.
        commits: the git commit of each of ``inputs``, set by
            :func:`megatron_hydra.data.hub.pin_revisions`.
        streaming: read file by file from the Hub without a copy on disk.
        unit_bytes: size of a unit of a JSONL or lines file, in bytes; approximate size for an Arrow file.
    """

    inputs: tuple[str, ...]
    format: Format | None = option(
        None,
        "format of --input (default: by suffix). text: one document per file; lines: one per line",
        group="rows",
    )
    column: str = option("text", "field that holds the text (default: text)", group="rows")
    chat: bool = option(False, "treat the field as a list of chat messages", group="rows")
    tools_column: str | None = option(
        None, "with --chat: field that holds the tool definitions", metavar="NAME", group="rows"
    )
    hub: bool = False
    config_name: str | None = option(
        None,
        "configuration of the data set",
        flag="--config",
        metavar="NAME",
        group="with --dataset",
    )
    split: str = option("train", "default: train", group="with --dataset")
    revision: str | None = option(
        None, "git revision; its commit is recorded", metavar="COMMIT", group="with --dataset"
    )
    commits: tuple[str | None, ...] = ()
    streaming: bool = option(
        False, "stream the data set without a copy on disk", group="with --dataset"
    )
    unit_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        if self.tools_column and not self.chat:
            raise HydraError("--tools-column needs --chat: only conversations have tools")

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of a row to read."""
        return (self.column, self.tools_column) if self.tools_column else (self.column,)


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of an input that one process reads.

    Attributes:
        path: file, or data set.
        kind: how to read it.
        begin, end: bytes, rows, row-group or shard numbers, depending on ``kind``; end exclusive.
        size: bytes, or another measure of its work, for progress.
    """

    path: str
    kind: Literal["jsonl", "lines", "text", "compressed", "parquet", "arrow", "stream"]
    begin: int
    end: int
    size: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: its text or messages, or its error.

    Attributes:
        where: file and byte, row or line, for messages.
        value: text, or a list of messages; ``None`` for a bad row.
        error: description of the error.
        tools: tools of a conversation, for the chat template.
    """

    where: str
    value: Any
    error: str = ""
    tools: list[Any] | None = None


def input_identity(corpus: CorpusConfig) -> list[dict[str, Any]]:
    """Identity of the inputs, for the manifest.

    A file is identified by name, size and a hash of 64 blocks. A Hub data set is identified by name and
    commit, or by the given revision if the commit could not be looked up.
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
        for p in all_files(list_inputs(corpus))
    ]


def list_inputs(corpus: CorpusConfig) -> list[Listing]:
    """The files of each input, in the order given, folders and patterns sorted.

    Raises:
        HydraError: an input has no files.
    """
    listings = []
    for name in corpus.inputs:
        listing = _files_of(name, corpus)
        if not listing.files:
            others = f"; not read are {listing}" if listing.left_out else ""
            raise HydraError(
                f"--input {name}: no such file, or a folder or pattern without data files "
                f"({', '.join(sorted(SUFFIXES))}){others}; for a Hub data set use --dataset"
            )
        listings.append(listing)
    return listings


def all_files(listings: list[Listing]) -> list[str]:
    """The paths of all inputs, in order."""
    return [path for listing in listings for path in listing.files]


def _files_of(name: str, corpus: CorpusConfig) -> Listing:
    """The files of one input."""
    if os.path.isdir(name):
        return list_folder(Path(name), corpus.format)
    if glob.has_magic(name) and not os.path.exists(name):
        found = sorted(glob.glob(name, recursive=True))
        return Listing(
            tuple(path for path in found if os.path.isfile(path)),
            tuple((path, "folders") for path in found if os.path.isdir(path)),
        )
    return Listing((name,) if os.path.isfile(name) else ())
