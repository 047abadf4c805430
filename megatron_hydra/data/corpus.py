"""Inputs of tokenization: files and Hub data sets, cut into units that are read independently.

A unit is a stretch of an input that one process reads from start to end: a byte range of a JSONL
file, a row group of a Parquet file, rows of an Arrow file, one shard of a streamed data set. The
list of units depends on the inputs and on nothing else, and the rows of all units in order are the
rows of the inputs in order.
"""

from __future__ import annotations

import dataclasses
import glob
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

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
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_READ_ROWS = 512


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Where rows come from.

    Attributes:
        inputs: files, folders or glob patterns; or one Hub data set (or local folder) with ``hub``.
        format: of the files; ``None``: by suffix. ``text``: a file is a document; ``lines``: a
            line is.
        column: the field that holds the text, or the list of messages with ``chat``.
        chat: rows are conversations.
        hub: ``inputs`` is a data set for ``datasets.load_dataset``.
        config_name, split, revision: its configuration, split and git revision.
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
        return _hub_units(corpus)
    units: list[Unit] = []
    for path in _expand(corpus.inputs):
        if os.path.getsize(path) == 0:
            raise HydraError(f"{path} is empty (0 bytes); leave it out or repair it")
        units += _file_units(path, corpus)
    return units


def input_identity(corpus: CorpusConfig) -> list[dict[str, Any]]:
    """Names and sizes of the inputs, for the manifest; a Hub data set by name and revision."""
    if corpus.hub:
        keys = ("config_name", "split", "revision", "streaming")
        return [
            {"dataset": name, **{k: getattr(corpus, k) for k in keys}} for name in corpus.inputs
        ]
    paths = _expand(corpus.inputs)
    return [{"file": os.path.basename(p), "bytes": os.path.getsize(p)} for p in paths]


def _expand(inputs: tuple[str, ...]) -> list[str]:
    """Files of the inputs, in the order given, folders and patterns sorted."""
    paths: list[str] = []
    for name in inputs:
        if os.path.isdir(name):
            found = sorted(str(p) for p in Path(name).rglob("*") if _format_of(str(p)) is not None)
            found = [p for p in found if not os.path.basename(p).startswith((".", "dataset_info"))]
            found = [p for p in found if os.path.basename(p) != "state.json"]
        elif glob.has_magic(name) and not os.path.exists(name):
            found = sorted(glob.glob(name, recursive=True))
        else:
            found = [name] if os.path.isfile(name) else []
        if not found:
            raise HydraError(
                f"--input {name}: no such file, or a folder or pattern without data files "
                f"({', '.join(sorted(_SUFFIXES))}); for a Hub data set use --dataset"
            )
        paths += found
    return paths


def _format_of(path: str) -> Format | None:
    stem, suffix = os.path.splitext(path)
    if suffix in _COMPRESSED:
        suffix = os.path.splitext(stem)[1]
    return _SUFFIXES.get(suffix)


def _file_units(path: str, corpus: CorpusConfig) -> list[Unit]:
    kind = corpus.format or _format_of(path)
    size = os.path.getsize(path)
    if kind is None:
        raise HydraError(f"{path}: unknown suffix; say what it is with --format")
    if path.endswith(_COMPRESSED) and kind in ("jsonl", "lines"):
        return [Unit(path, "compressed", 0, size, size)]
    if kind == "text":
        return [Unit(path, "text", 0, size, size)]
    if kind in ("jsonl", "lines"):
        starts = range(0, size, corpus.unit_bytes)
        ends = [min(start + corpus.unit_bytes, size) for start in starts]
        return [Unit(path, kind, a, b, b - a) for a, b in zip(starts, ends, strict=True)]
    try:
        return _parquet_units(path) if kind == "parquet" else _arrow_units(path, corpus)
    except (OSError, ValueError) as error:
        raise HydraError(f"{path}: cannot be opened as {kind}: {error}") from error


def _parquet_units(path: str) -> list[Unit]:
    import pyarrow.parquet

    metadata = pyarrow.parquet.ParquetFile(path).metadata
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    return [Unit(path, "parquet", i, i + 1, size) for i, size in enumerate(sizes)]


def _arrow_units(path: str, corpus: CorpusConfig) -> list[Unit]:
    from datasets import Dataset

    rows = len(Dataset.from_file(path))
    size = os.path.getsize(path)
    step = max(1, rows * corpus.unit_bytes // max(size, 1))
    spans = [(a, min(a + step, rows)) for a in range(0, rows, step)]
    return [Unit(path, "arrow", a, b, size * (b - a) // rows) for a, b in spans]


def _load_hub(corpus: CorpusConfig, name: str, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            name,
            corpus.config_name,
            split=corpus.split,
            revision=corpus.revision,
            streaming=streaming,
        )
    except Exception as error:  # datasets raises many types; the reader needs the name
        raise HydraError(f"--dataset {name}: cannot load it: {error}") from error


def _hub_units(corpus: CorpusConfig) -> list[Unit]:
    units: list[Unit] = []
    for name in corpus.inputs:
        data = _load_hub(corpus, name, corpus.streaming)
        if corpus.streaming:
            units += [Unit(name, "stream", i, data.num_shards, 1) for i in range(data.num_shards)]
        else:
            for file in data.cache_files:
                units += _arrow_units(file["filename"], corpus)
    return units


def read_unit(unit: Unit, corpus: CorpusConfig) -> Iterator[Row]:
    """The rows of one unit, in order; unreadable rows carry their error."""
    if unit.kind in ("jsonl", "lines"):
        kind = corpus.format or unit.kind
        yield from _lines_of_range(unit, kind, corpus)
    elif unit.kind == "compressed":
        kind = corpus.format or _format_of(unit.path) or "jsonl"
        yield from _compressed_rows(unit, kind, corpus)
    elif unit.kind == "text":
        yield _text_row(unit.path)
    else:
        yield from _table_rows(unit, corpus)


def _lines_of_range(unit: Unit, kind: str, corpus: CorpusConfig) -> Iterator[Row]:
    """Lines that begin in [begin, end)."""
    with open(unit.path, "rb") as stream:
        position = unit.begin
        if position:
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        else:
            stream.seek(0)
        while position < unit.end:
            line = stream.readline()
            if not line:
                return
            if line.strip():
                yield _parse_line(line, f"{unit.path}, byte {position:,}", kind, corpus)
            position += len(line)


def _compressed_rows(unit: Unit, kind: str, corpus: CorpusConfig) -> Iterator[Row]:
    import pyarrow as pa

    with pa.input_stream(unit.path, compression="detect") as raw:
        try:
            for number, line in enumerate(io.BufferedReader(raw, 1 << 20), start=1):
                if line.strip():
                    yield _parse_line(line, f"{unit.path}, line {number:,}", kind, corpus)
        except OSError as error:
            raise HydraError(f"{unit.path}: cannot be decompressed: {error}") from error


def _parse_line(line: bytes, where: str, kind: str, corpus: CorpusConfig) -> Row:
    try:
        text = line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")
        if kind == "lines":
            return Row(where, text.rstrip("\r\n"))
        body = json.loads(text)
    except UnicodeDecodeError as error:
        return Row(where, None, f"not UTF-8 ({error.reason} at byte {error.start} of the line)")
    except ValueError as error:
        return Row(where, None, f"not JSON ({error})")
    if not isinstance(body, dict):
        return Row(where, None, f"not a JSON object but {type(body).__name__}")
    return _row(where, body.get(corpus.column), corpus)


def _text_row(path: str) -> Row:
    import pyarrow as pa

    compression = "detect" if path.endswith(_COMPRESSED) else None
    try:
        with pa.input_stream(path, compression=compression) as stream:
            return Row(path, stream.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(path, None, f"not UTF-8 ({error.reason} at byte {error.start:,})")
    except OSError as error:
        raise HydraError(f"{path}: cannot be read: {error}") from error


def _table_rows(unit: Unit, corpus: CorpusConfig) -> Iterator[Row]:
    """Rows of Parquet, Arrow and streamed data."""
    column = corpus.column
    if unit.kind == "parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(unit.path)
        if column not in table.schema_arrow.names:
            raise HydraError(_no_column(unit.path, column, table.schema_arrow.names))
        batches = table.iter_batches(_READ_ROWS, row_groups=[unit.begin], columns=[column])
        values = (value for batch in batches for value in batch.column(0).to_pylist())
        first, name = 0, f"{unit.path}, row group {unit.begin}, row"
    elif unit.kind == "arrow":
        from datasets import Dataset

        data = Dataset.from_file(unit.path)
        if column not in data.column_names:
            raise HydraError(_no_column(unit.path, column, data.column_names))
        blocks = (
            data[start : min(start + _READ_ROWS, unit.end)][column]
            for start in range(unit.begin, unit.end, _READ_ROWS)
        )
        values = (value for block in blocks for value in block)
        first, name = unit.begin, f"{unit.path}, row"
    else:
        data = _load_hub(corpus, unit.path, streaming=True)
        shard = data.shard(num_shards=unit.end, index=unit.begin)
        values = (row.get(column) for row in shard)
        first, name = 0, f"{unit.path}, shard {unit.begin}, row"
    for number, value in enumerate(values, start=first):
        yield _row(f"{name} {number:,}", value, corpus)


def _no_column(path: str, column: str, names: list[str]) -> str:
    return f"{path} has no column {column!r}; it has {', '.join(names)}; use --column"


def _row(where: str, value: Any, corpus: CorpusConfig) -> Row:
    wanted = list if corpus.chat else str
    if isinstance(value, wanted):
        return Row(where, value)
    found = "missing" if value is None else f"a {type(value).__name__}"
    kind = "a list of messages" if corpus.chat else "a string"
    return Row(where, None, f"field {corpus.column!r} is {found}, not {kind}")
