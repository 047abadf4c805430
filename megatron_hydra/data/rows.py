"""Rows of a unit, one at a time: text or messages, or what is wrong with them."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megatron_hydra.data.corpus import CorpusConfig, Row, Unit
from megatron_hydra.data.folder import compression_of, format_of
from megatron_hydra.data.hub import load_hub
from megatron_hydra.errors import HydraError

_READ_ROWS = 512


def read_unit(unit: Unit, corpus: CorpusConfig) -> Iterator[Row]:
    """The rows of one unit, in order; unreadable rows carry their error."""
    if unit.kind in ("jsonl", "lines"):
        kind = corpus.format or unit.kind
        yield from _lines_of_range(unit, kind, corpus)
    elif unit.kind == "compressed":
        kind = corpus.format or format_of(unit.path) or "jsonl"
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

    with pa.input_stream(unit.path, compression=compression_of(unit.path)) as raw:
        try:
            for number, line in enumerate(io.BufferedReader(raw, 1 << 20), start=1):
                if line.strip():
                    yield _parse_line(line, f"{unit.path}, line {number:,}", kind, corpus)
        except (OSError, ValueError) as error:
            raise HydraError(f"{unit.path}: cannot be decompressed: {error}") from error


def _parse_line(line: bytes, where: str, kind: str, corpus: CorpusConfig) -> Row:
    try:
        text = line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")
        if kind == "lines":
            return Row(where, text.rstrip("\r\n"))
        body = json.loads(text)
    except UnicodeDecodeError as error:
        return Row(where, None, f"not UTF-8 ({error.reason} at byte {error.start} of the line)")
    except (ValueError, RecursionError) as error:
        return Row(where, None, f"not JSON ({error})")
    if not isinstance(body, dict):
        return Row(where, None, f"not a JSON object but {type(body).__name__}")
    return _row(where, body.get(corpus.column), corpus)


def _text_row(path: str) -> Row:
    import pyarrow as pa

    try:
        with pa.input_stream(path, compression=compression_of(path)) as stream:
            return Row(path, stream.read().decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        return Row(path, None, f"not UTF-8 ({error.reason} at byte {error.start:,})")
    except OSError as error:
        raise HydraError(f"{path}: cannot be read: {error}") from error


def _table_rows(unit: Unit, corpus: CorpusConfig) -> Iterator[Row]:
    """Rows of Parquet, Arrow and streamed data."""
    values = {"parquet": _parquet_values, "arrow": _arrow_values, "stream": _stream_values}
    part = {"parquet": f"row group {unit.begin}, ", "stream": f"shard {unit.begin}, "}
    name = f"{unit.path}, {part.get(unit.kind, '')}row"
    first = unit.begin if unit.kind == "arrow" else 0
    try:
        for number, value in enumerate(values[unit.kind](unit, corpus), start=first):
            if isinstance(value, UnicodeDecodeError):
                yield Row(f"{name} {number:,}", None, f"not UTF-8 ({value.reason})")
            else:
                yield _row(f"{name} {number:,}", value, corpus)
    except HydraError:
        raise
    except Exception as error:  # pyarrow, datasets and the network raise what they like
        raise HydraError(
            f"{unit.path}: cannot be read ({type(error).__name__}: {error}); once this is mended, "
            "run the same command again: it goes on where it stopped"
        ) from error


def _parquet_values(unit: Unit, corpus: CorpusConfig) -> Iterator[Any]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(unit.path)
    _check_column(unit.path, corpus.column, table.schema_arrow.names)
    for batch in table.iter_batches(_READ_ROWS, row_groups=[unit.begin], columns=[corpus.column]):
        yield from _decoded(functools.partial(_column_values, batch.column(0)), batch.num_rows)


def _arrow_values(unit: Unit, corpus: CorpusConfig) -> Iterator[Any]:
    from datasets import Dataset

    data = Dataset.from_file(unit.path)
    _check_column(unit.path, corpus.column, data.column_names)
    for start in range(unit.begin, unit.end, _READ_ROWS):
        block = data.select(range(start, min(start + _READ_ROWS, unit.end)))
        yield from _decoded(functools.partial(_field_values, block, corpus.column), len(block))


def _column_values(column: Any, first: int, end: int) -> list[Any]:
    return column[first:end].to_pylist()


def _field_values(data: Any, name: str, first: int, end: int) -> list[Any]:
    return list(data[first:end][name])


def _stream_values(unit: Unit, corpus: CorpusConfig) -> Iterator[Any]:
    data = load_hub(corpus, unit.path, True)
    for number, row in enumerate(data.shard(num_shards=unit.end, index=unit.begin)):
        if number == 0:  # the end of a shard may be hours away
            _check_column(unit.path, corpus.column, list(row))
        yield row.get(corpus.column)


def _decoded(read: Callable[[int, int], Iterable[Any]], count: int) -> Iterator[Any]:
    """Values 0 … count−1 at once, or one by one where one is not UTF-8; that one as its error."""
    try:
        yield from list(read(0, count))
        return
    except UnicodeDecodeError:
        pass
    for index in range(count):
        try:
            (value,) = read(index, index + 1)
        except UnicodeDecodeError as error:
            value = error
        yield value


def _check_column(path: str, column: str, names: list[str]) -> None:
    if column not in names:
        raise HydraError(
            f"{path} has no column {column!r}; it has {', '.join(names)}; use --column"
        )


def _row(where: str, value: Any, corpus: CorpusConfig) -> Row:
    wanted = list if corpus.chat else str
    if isinstance(value, wanted):
        return Row(where, value)
    found = "missing" if value is None else f"a {type(value).__name__}"
    kind = "a list of messages" if corpus.chat else "a string"
    return Row(where, None, f"field {corpus.column!r} is {found}, not {kind}")
