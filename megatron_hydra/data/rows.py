"""Read the rows of a unit one at a time: text or messages, or an error."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from megatron_hydra.data.corpus import CorpusConfig, Row, Unit
from megatron_hydra.data.folder import compression_of, format_of
from megatron_hydra.data.hub import load_hub
from megatron_hydra.data.units import arrow_table
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
    """Lines that start in [begin, end)."""
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
            raise _not_decompressed(unit.path, error) from error


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
    return _row(where, [body.get(column) for column in corpus.columns], corpus)


def _text_row(path: str) -> Row:
    import pyarrow as pa

    try:
        with pa.input_stream(path, compression=compression_of(path)) as stream:
            return Row(path, stream.read().decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        return Row(path, None, f"not UTF-8 ({error.reason} at byte {error.start:,})")
    except OSError as error:
        raise _not_decompressed(path, error) from error


def _not_decompressed(path: str, error: Exception) -> HydraError:
    advice = ""
    if "requires too much memory" in str(error):
        advice = (
            "; its window is too long (zstd --long): unpack it with zstd -d --long=31, or compress it "
            "without --long"
        )
    what = "decompressed" if compression_of(path) else "read"
    return HydraError(f"{path}: cannot be {what}: {error}{advice}")


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
                yield _row(f"{name} {number:,}", _without_nulls(value), corpus)
    except HydraError:
        raise
    except Exception as error:  # pyarrow, datasets and the network can raise any error
        raise HydraError(
            f"{unit.path}: cannot be read ({type(error).__name__}: {error}). Fix this and run the same "
            "command again; it resumes"
        ) from error


def _without_nulls(value: Any) -> Any:
    """Messages without nulls. A table has them if a message of another row has the field."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, (list, tuple)) else value


def _parquet_values(unit: Unit, corpus: CorpusConfig) -> Iterator[Any]:
    import pyarrow.parquet

    table, columns = pyarrow.parquet.ParquetFile(unit.path), list(corpus.columns)
    _check_columns(unit.path, columns, table.schema_arrow.names)
    for batch in table.iter_batches(_READ_ROWS, row_groups=[unit.begin], columns=columns):
        arrays = [batch.column(name) for name in columns]
        yield from _decoded(functools.partial(_column_values, arrays), batch.num_rows)


def _arrow_values(unit: Unit, corpus: CorpusConfig) -> Iterator[Any]:
    table = arrow_table(unit.path)
    _check_columns(unit.path, corpus.columns, table.column_names)
    for start in range(unit.begin, unit.end, _READ_ROWS):
        block = table.slice(start, min(_READ_ROWS, unit.end - start))
        columns = [block.column(name) for name in corpus.columns]
        yield from _decoded(functools.partial(_column_values, columns), block.num_rows)


def _column_values(columns: Sequence[Any], first: int, end: int) -> list[tuple[Any, ...]]:
    return list(zip(*(column[first:end].to_pylist() for column in columns), strict=True))


def _stream_values(unit: Unit, corpus: CorpusConfig) -> Iterator[Any]:
    data = load_hub(corpus, unit.path, True)
    for number, row in enumerate(data.shard(num_shards=unit.end, index=unit.begin)):
        if number == 0:  # check only here: the end of a shard may be hours away
            _check_columns(unit.path, corpus.columns, list(row))
        yield tuple(row.get(column) for column in corpus.columns)


def _decoded(read: Callable[[int, int], Iterable[Any]], count: int) -> Iterator[Any]:
    """Values 0 … count−1 at once. If one is not UTF-8, read them one by one and yield its error."""
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


def _check_columns(path: str, columns: Sequence[str], names: Sequence[str]) -> None:
    for column, option in zip(columns, ("--column", "--tools-column"), strict=False):
        if column not in names:
            raise HydraError(
                f"{path} has no column {column!r}; it has {', '.join(names)}; use {option}"
            )


def _row(where: str, values: Sequence[Any], corpus: CorpusConfig) -> Row:
    """Make a row from the values of ``corpus.columns``."""
    value = values[0]
    wanted = list if corpus.chat else str
    if not isinstance(value, wanted):
        found = "missing" if value is None else f"a {type(value).__name__}"
        kind = "a list of messages" if corpus.chat else "a string"
        return Row(where, None, f"field {corpus.column!r} is {found}, not {kind}")
    if not corpus.tools_column:
        return Row(where, value)
    try:
        return Row(where, value, tools=_tools(values[1]))
    except ValueError:
        error = f"field {corpus.tools_column!r} is neither a list of tools nor JSON of such a list"
        return Row(where, None, error)


def _tools(value: Any) -> list[Any] | None:
    """The tools of a conversation. Data sets store them as a list or as JSON."""
    tools = json.loads(value) if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("no list of mappings")
    return tools
