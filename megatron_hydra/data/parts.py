"""Parts of a preparation on disk, and their assembly into one ``.bin/.idx`` pair.

A part has four files and a ``.json``, which is renamed into place last and marks the part as complete. Parts
are appended in order to growing files. The sizes of these files are recorded and synced before the parts are
deleted. So the folder always has all finished work exactly once.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hydra.data.indexed import OnDisk, write_boundaries, write_index
from megatron_hydra.data.manifest import FileRecord, file_record
from megatron_hydra.errors import HydraError
from megatron_hydra.files import sync, write_json_atomic

SHOWN_ROWS = 5
_SUFFIXES = ("bin", "len", "doc", "mode")
_COPY_BYTES = 4 << 20
_SYNC_SECONDS = 5.0


@dataclasses.dataclass
class Counts:
    """Counts of rows, documents and tokens.

    Attributes:
        rows: rows read, including ``empty_rows`` (without text) and ``bad_rows`` (unreadable).
        documents, sequences, tokens: numbers written.
        max_token_id, longest_document: the largest id; number of tokens of the longest document.
    """

    rows: int = 0
    empty_rows: int = 0
    bad_rows: int = 0
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    max_token_id: int = 0
    longest_document: int = 0

    def add(self, other: Counts) -> None:
        """Add the counts of a further part."""
        for field in dataclasses.fields(self):
            own, new = getattr(self, field.name), getattr(other, field.name)
            is_maximum = field.name in ("max_token_id", "longest_document")
            setattr(self, field.name, max(own, new) if is_maximum else own + new)


def part_path(work: Path, number: int) -> Path:
    """Path of a part, without suffix."""
    return work / f"part-{number:08d}"


def _number_and_kind(path: Path) -> tuple[int, str]:
    """Number of the file's part, and the text after the first dot of the name."""
    stem, _, kind = path.name.partition(".")
    return int(stem.split("-")[1]), kind


class PartWriter:
    """Writes one part.

    Attributes:
        counts: counts of the part, complete after :meth:`finish`.
        itemsize: bytes per token.
    """

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        """Begin part ``path`` (without suffix)."""
        self.counts = Counts()
        self.itemsize = np.dtype(dtype).itemsize
        self._dtype = dtype
        self._path = path
        self._temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        self._stream = open(self._temporary, "wb", buffering=_COPY_BYTES)  # noqa: SIM115
        # Arrays, not lists of Python numbers: a unit may be a whole compressed file.
        self._columns = {"len": array.array("i"), "doc": array.array("i"), "mode": array.array("b")}
        self._bad: list[list[str]] = []

    def add(self, encoded: bytes, lengths: list[int], modes: list[int]) -> None:
        """Append one document.

        Args:
            encoded: bytes of its tokens.
            lengths: number of tokens of each of its sequences.
            modes: one mode per sequence, or an empty list.
        """
        self._stream.write(encoded)
        self._columns["len"].extend(lengths)
        self._columns["doc"].append(len(lengths))
        self._columns["mode"].extend(modes)
        size = len(encoded) // self.itemsize
        self.counts.longest_document = max(self.counts.longest_document, size)

    def bad(self, where: str, error: str) -> None:
        """Count an unreadable row, and record the first few."""
        self.counts.bad_rows += 1
        if len(self._bad) < SHOWN_ROWS:
            self._bad.append([where, error])

    def finish(self) -> None:
        """Complete the part: write its ``.json``."""
        self._stream.close()
        self.counts.documents = len(self._columns["doc"])
        self.counts.sequences = len(self._columns["len"])
        self.counts.tokens = self._temporary.stat().st_size // self.itemsize
        with open(self._temporary, "rb") as stream:
            while block := stream.read(_COPY_BYTES):
                largest = int(np.frombuffer(block, self._dtype).max())
                self.counts.max_token_id = max(self.counts.max_token_id, largest)
        os.replace(self._temporary, f"{self._path}.bin")
        for suffix, values in self._columns.items():
            self._temporary.write_bytes(values)
            os.replace(self._temporary, f"{self._path}.{suffix}")
        body = {"counts": dataclasses.asdict(self.counts), "bad": self._bad}
        write_json_atomic(f"{self._path}.json", body)

    def discard(self) -> None:
        """Remove the files."""
        with contextlib.suppress(OSError):
            self._stream.close()
        self._temporary.unlink(missing_ok=True)


@dataclasses.dataclass
class State:
    """State of the growing files.

    Attributes:
        parts: number of appended parts.
        counts: sums over these parts.
        bad: place and error of the first bad rows.
        full: whether the token limit is reached.
    """

    parts: int = 0
    counts: Counts = dataclasses.field(default_factory=Counts)
    bad: list[list[str]] = dataclasses.field(default_factory=list)
    full: bool = False

    @classmethod
    def load(cls, path: Path) -> State:
        """Read the state, or return a new one."""
        if not path.exists():
            return cls()
        body = json.loads(path.read_text(encoding="utf-8"))
        return cls(body["parts"], Counts(**body["counts"]), body["bad"], body["full"])


class Assembler:
    """Appends parts in order to the growing files of a work folder.

    Attributes:
        state: state of the appended parts.
    """

    def __init__(
        self, work: Path, dtype: type[np.generic], *, has_modes: bool, max_tokens: int = 0
    ) -> None:
        """Continue from the folder's state.

        Args:
            work: the folder.
            dtype: dtype of the tokens.
            has_modes: whether sequences have modes.
            max_tokens: stop before the document that would exceed it; 0: no limit.
        """
        self.work, self.dtype = work, dtype
        self.itemsize = np.dtype(dtype).itemsize
        self._has_modes, self._max_tokens = has_modes, max_tokens
        self.state = State.load(work / "state.json")
        self._sha256 = hashlib.sha256()
        self._merged: list[int] = []
        self._synced = time.monotonic()
        for stale in (*work.glob("*.tmp-*"), *work.glob(".*.tmp")):
            stale.unlink()
        for path in work.glob("part-*.*"):
            if _number_and_kind(path)[0] < self.state.parts:
                path.unlink()
        sizes = self._sizes(self.state.counts)
        self._streams = {suffix: self._reopen(suffix, size) for suffix, size in sizes.items()}

    def _sizes(self, counts: Counts) -> dict[str, int]:
        """Size in bytes of each file for these ``counts``."""
        return {
            "bin": counts.tokens * self.itemsize,
            "len": counts.sequences * 4,
            "doc": counts.documents * 4,
            "mode": counts.sequences if self._has_modes else 0,
        }

    def _reopen(self, suffix: str, size: int) -> Any:
        path = self.work / f"all.{suffix}"
        path.touch()
        if path.stat().st_size < size:
            raise HydraError(
                f"{path} is shorter than recorded; delete {self.work} and prepare the data again"
            )
        stream = open(path, "r+b")  # noqa: SIM115
        stream.truncate(size)
        if suffix == "bin":
            while block := stream.read(_COPY_BYTES):
                self._sha256.update(block)
        stream.seek(size)
        return stream

    def append(self, number: int) -> None:
        """Append part ``number``, which must be the next one."""
        path = part_path(self.work, number)
        body = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
        counts = Counts(**body["counts"])
        if self._max_tokens and self.state.counts.tokens + counts.tokens > self._max_tokens:
            counts = self._shortened(path, counts)
            self.state.full = True
        for suffix, size in self._sizes(counts).items():
            self._copy(f"{path}.{suffix}", suffix, size)
        self.state.parts = number + 1
        self.state.counts.add(counts)
        self.state.bad = (self.state.bad + body["bad"])[:SHOWN_ROWS]
        self._merged.append(number)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def tokens_in_work(self) -> int:
        """Number of tokens of parts that are complete or in work but not appended yet."""
        size = 0
        for path in self.work.glob("part-*.*"):
            number, kind = _number_and_kind(path)
            if number >= self.state.parts and (kind == "bin" or kind.startswith("tmp-")):
                with contextlib.suppress(FileNotFoundError):  # its worker has just renamed it
                    size += path.stat().st_size
        return size // self.itemsize

    def _shortened(self, path: Path, counts: Counts) -> Counts:
        """Counts of the first documents of a part that fit within ``max_tokens``."""
        room = self._max_tokens - self.state.counts.tokens
        documents = np.fromfile(f"{path}.doc", np.int32)
        ends = np.concatenate([[0], np.cumsum(np.fromfile(f"{path}.len", np.int32))])
        document_ends = ends[np.cumsum(documents)]
        fits = int(np.searchsorted(document_ends, room, side="right"))
        sequences = int(documents[:fits].sum())
        tokens = int(ends[sequences])
        kept = np.fromfile(f"{path}.bin", self.dtype, tokens)
        return dataclasses.replace(
            counts,
            documents=fits,
            sequences=sequences,
            tokens=tokens,
            max_token_id=int(kept.max()) if tokens else 0,
            longest_document=int(np.diff(document_ends[:fits], prepend=0).max()) if fits else 0,
        )

    def _copy(self, source: str, suffix: str, size: int) -> None:
        with open(source, "rb") as stream:
            while size > 0:
                block = stream.read(min(_COPY_BYTES, size))
                if not block:
                    raise HydraError(
                        f"{source} is truncated; delete {self.work} and prepare the data again"
                    )
                self._streams[suffix].write(block)
                if suffix == "bin":
                    self._sha256.update(block)
                size -= len(block)

    def sync(self) -> None:
        """Sync the appended data to disk, then delete their parts."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        write_json_atomic(self.work / "state.json", dataclasses.asdict(self.state))
        for number in self._merged:
            for suffix in ("json", *_SUFFIXES):
                os.unlink(f"{part_path(self.work, number)}.{suffix}")
        self._merged.clear()
        self._synced = time.monotonic()

    def finish(self) -> tuple[FileRecord, FileRecord]:
        """Close the growing files and write the index into the work folder.

        Returns:
            Records of ``all.bin`` and ``all.idx``.
        """
        self.sync()
        for stream in self._streams.values():
            stream.close()
        lengths = OnDisk(self.work / "all.len", np.int32)
        documents = write_boundaries(OnDisk(self.work / "all.doc", np.int32), self.work / "all.end")
        modes = OnDisk(self.work / "all.mode", np.int8) if self._has_modes else None
        index = self.work / "all.idx"
        write_index(str(index), self.dtype, lengths, documents, modes)
        return file_record(self.work / "all.bin", self._sha256.hexdigest()), file_record(index)

    def close(self) -> None:
        """Close the growing files without updating the state."""
        for stream in self._streams.values():
            with contextlib.suppress(OSError):
                stream.close()


def publish(work: Path, prefix: str) -> None:
    """Move ``all.idx``, ``all.bin`` and ``manifest.json`` of a work folder to their final names.

    It can be repeated after a kill: it skips files that were moved already. The manifest is moved last, so an
    output with a manifest is complete.
    """
    for source, suffix in (("all.idx", ".idx"), ("all.bin", ".bin"), ("manifest.json", ".json")):
        if (work / source).exists():
            os.replace(work / source, prefix + suffix)
        sync(
            Path(prefix).resolve().parent
        )  # the manifest's name may not be on the disk before the others'
    (work / "plan.json").unlink(missing_ok=True)
    shutil.rmtree(work)
