"""List the units of a corpus (:mod:`~megatron_hydra.data.corpus`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from megatron_hydra.data.corpus import CorpusConfig, Unit, all_files, list_inputs
from megatron_hydra.data.folder import (
    Listing,
    compression_of,
    format_of,
    refuse_compression,
    repeated,
)
from megatron_hydra.data.hub import load_hub
from megatron_hydra.errors import HydraError


def plan_units(
    corpus: CorpusConfig, report: Callable[[str], None] = lambda line: None
) -> list[Unit]:
    """All units of the corpus, in order.

    Args:
        corpus: the source of the rows.
        report: function that takes a line for each input with skipped files, and for each file read twice.

    Raises:
        HydraError: an input is missing or empty, or has an unknown format.
    """
    if corpus.hub:
        return _hub_units(corpus)
    listings = list_inputs(corpus)
    for line in _notes(corpus, listings):
        report(line)
    units: list[Unit] = []
    for path in all_files(listings):
        if os.path.getsize(path) == 0:
            raise HydraError(f"{path} is empty (0 bytes); remove it or repair it")
        own = _file_units(path, corpus)
        if not own:
            raise HydraError(f"{path} is empty (a table without rows); remove it or repair it")
        units += own
    return units


def _notes(corpus: CorpusConfig, listings: list[Listing]) -> Iterator[str]:
    """A line for each input with skipped files, and for each file that is read twice."""
    for name, listing in zip(corpus.inputs, listings, strict=True):
        if listing.left_out:
            yield f"--input {name}: {len(listing.files)} files are read, not read are {listing}"
    for first, again in repeated(all_files(listings)):
        yield f"{again} is the same file as {first}: it is read twice"


def _file_units(path: str, corpus: CorpusConfig) -> list[Unit]:
    refuse_compression(path)
    if not os.access(path, os.R_OK):
        raise HydraError(f"{path} cannot be read: no permission")
    kind = corpus.format or format_of(path)
    size = os.path.getsize(path)
    if kind is None:
        raise HydraError(f"{path}: unknown suffix; give its format with --format")
    if compression_of(path) and kind in ("jsonl", "lines"):
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
    if metadata.num_rows == 0:
        return []
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    return [Unit(path, "parquet", i, i + 1, size) for i, size in enumerate(sizes)]


def arrow_table(path: str) -> Any:
    """An Arrow file in stream format (``datasets``) or file format, as a memory-mapped table."""
    import pyarrow as pa

    source = pa.memory_map(path)
    is_file_format = source.read(6) == b"ARROW1"
    source.seek(0)
    return (pa.ipc.open_file if is_file_format else pa.ipc.open_stream)(source).read_all()


def _arrow_units(path: str, corpus: CorpusConfig) -> list[Unit]:
    """Units of an Arrow file; none if it has no rows."""
    rows = arrow_table(path).num_rows
    size = os.path.getsize(path)
    step = max(1, rows * corpus.unit_bytes // max(size, 1))
    spans = [(a, min(a + step, rows)) for a in range(0, rows, step)]
    return [Unit(path, "arrow", a, b, size * (b - a) // rows) for a, b in spans]


def _hub_units(corpus: CorpusConfig) -> list[Unit]:
    """Units of all data sets: shards of streamed data sets, else parts of their Arrow files.

    Raises:
        HydraError: a data set cannot be loaded, or ``split`` names a slice of a split.
    """
    units: list[Unit] = []
    for name in corpus.inputs:
        data = load_hub(corpus, name, corpus.streaming)
        if corpus.streaming:
            units += [Unit(name, "stream", i, data.num_shards, 1) for i in range(data.num_shards)]
            continue
        own = [u for file in data.cache_files for u in _arrow_units(file["filename"], corpus)]
        if sum(unit.end - unit.begin for unit in own) != len(data):
            raise HydraError(
                f"--dataset {name} --split {corpus.split}: only whole splits can be read, not slices; name the "
                "whole split, and limit it with --max-tokens"
            )
        units += own
    return units
