r"""Megatron's IndexedDataset (``.bin`` tokens, ``.idx`` index): checked reading, fast writing.

Layout of ``.idx`` (Megatron-Core ``datasets/indexed_dataset.py``), little endian::

    9 bytes   b"MMIDIDX\0\0"          8 bytes  version 1         1 byte  dtype code
    8 bytes   number of sequences n   8 bytes  number of document boundaries d
    n int32   sequence lengths        n int64  byte offsets into .bin
    d int64   document boundaries (sequence numbers, first 0, last n)
    n int8    modes, in multimodal files only

Documents with loss only on answers are stored as several sequences with mode 1 (loss) or 0 (context).
Readers without support for modes see the same tokens.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import io
import os
import struct
from collections.abc import Iterator

import numpy as np

from megatron_hydra.data.document import Document
from megatron_hydra.data.manifest import Manifest, file_probe
from megatron_hydra.errors import HydraError
from megatron_hydra.files import atomic_file

HEADER = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
DTYPE_CODES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CHUNK = 1 << 22
_BLOCK = 1 << 18
"""Number of index entries in memory at a time while an index is written."""


class IndexedDocuments:
    """A ``.bin/.idx`` pair opened for reading. Opening fails if the pair is incomplete or inconsistent.

    Opening takes the same time for ten documents and for ten million: it checks sizes and the two ends of the
    index, and the rest is read on access. Only the file of tokens stays open, from the first read on, so a
    blend can have a thousand pairs. Tokens are read from the file and not memory-mapped. So the memory of a
    run does not grow with the data read, and a file that is truncated during a job is an error, not a SIGBUS.

    Attributes:
        prefix: path without suffix.
        manifest: the manifest next to the files, or ``None`` (files made by Megatron-LM).
        num_documents, num_tokens: sizes.
        learned_spans: whether sequence modes mark the tokens with a loss.
    """

    def __init__(self, prefix: str) -> None:
        """Open ``prefix``.bin and ``prefix``.idx.

        Raises:
            HydraError: a file is missing, truncated, empty or inconsistent, or differs from the
                manifest.
        """
        self.prefix = prefix
        for suffix in (".idx", ".bin"):
            if not os.path.exists(prefix + suffix):
                raise HydraError(
                    f"{prefix + suffix} does not exist; path is the prefix of a .bin/.idx pair, as "
                    "given to data_prep/tokenize.py --output"
                )
        self.manifest = (
            Manifest.load(prefix + ".json") if os.path.exists(prefix + ".json") else None
        )
        self._probes = None if self.manifest is None else self.manifest.check_files(prefix)
        self.dtype, self.num_sequences, boundaries, has_modes = _read_header(prefix)
        self.itemsize = np.dtype(self.dtype).itemsize
        self.num_documents = boundaries - 1
        at = HEADER_BYTES
        self._columns: dict[str, tuple[int, type[np.generic], int]] = {}
        for name, kind, count in (
            ("lengths", np.int32, self.num_sequences),
            ("pointers", np.int64, self.num_sequences),
            ("documents", np.int64, boundaries),
            ("modes", np.int8, self.num_sequences if has_modes else 0),
        ):
            self._columns[name] = at, kind, count
            at += count * np.dtype(kind).itemsize
        last = self.num_sequences - 1
        expected = int(self._column("pointers", last)[0])
        expected += int(self._column("lengths", last)[0]) * self.itemsize
        actual = os.path.getsize(prefix + ".bin")
        if actual != expected:
            word = "truncated" if actual < expected else "too long"
            raise HydraError(
                f"{prefix}.bin is {word}: {actual:,} bytes, its index says {expected:,}; copy or "
                "prepare it again"
            )
        self.num_tokens = actual // self.itemsize
        self.learned_spans = self.manifest is not None and self.manifest.loss == "answers"
        if self.learned_spans and not has_modes:
            raise HydraError(f"{prefix}.json says loss=answers, but {prefix}.idx has no modes")

    def _column(self, name: str, first: int = 0, count: int = -1) -> np.ndarray:
        """Read entries of the index, starting at ``first``."""
        begin, kind, total = self._columns[name]
        count = total - first if count < 0 else count
        offset = begin + first * np.dtype(kind).itemsize
        found = np.fromfile(self.prefix + ".idx", kind, count, offset=offset)
        if len(found) != count:
            raise HydraError(
                f"{self.prefix}.idx ends early, but it was complete when it was opened; it may have been "
                "changed since"
            )
        return found

    @functools.cached_property
    def _tokens(self) -> io.FileIO:
        return open(self.prefix + ".bin", "rb", buffering=0)

    @functools.cached_property
    def _mapped(self) -> dict[str, np.ndarray]:
        """Memory-mapped columns, to look up single entries without reading the file."""
        whole = np.memmap(self.prefix + ".idx", mode="r", order="C")
        return {
            name: np.frombuffer(whole, kind, count, begin)
            for name, (begin, kind, count) in self._columns.items()
            if count
        }

    def fingerprint(self) -> str:
        """Identity of the tokens and documents; needs O(1) reads."""
        if self._probes is None:
            self._probes = {suffix: file_probe(self.prefix + suffix) for suffix in (".bin", ".idx")}
        probes = self._probes[".idx"] + self._probes[".bin"]
        return hashlib.sha256(f"{probes}:{self.learned_spans}".encode()).hexdigest()

    def sequence_lengths(self) -> np.ndarray:
        """Length of every sequence in tokens, int32 ``[sequences]``."""
        return self._column("lengths")

    def sequence_modes(self) -> np.ndarray | None:
        """Mode of every sequence, int8 ``[sequences]``; ``None`` if the file has none."""
        return self._column("modes") if self._columns["modes"][2] else None

    def document_boundaries(self) -> np.ndarray:
        """First sequence of every document, and the end, int64 ``[documents + 1]``."""
        return self._column("documents")

    def document_spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Position of each document in the token stream.

        Returns:
            ``offsets`` int64 ``[documents]`` and ``lengths`` int64 ``[documents]``, in tokens.

        Raises:
            HydraError: the index contradicts itself.
        """
        lengths = self.sequence_lengths().astype(np.int64)
        starts = np.zeros(self.num_sequences + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        pointers = self._column("pointers")
        if (lengths < 0).any() or not np.array_equal(pointers, starts[:-1] * self.itemsize):
            raise HydraError(
                f"{self.prefix}.idx: sequences are not contiguous; the file may be damaged"
            )
        edges = self.document_boundaries()
        if (np.diff(edges) < 0).any():
            raise HydraError(
                f"{self.prefix}.idx: document boundaries are not sorted; it may be damaged"
            )
        offsets = starts[edges]
        return offsets[:-1], np.diff(offsets)

    def read_raw(self, offset: int, length: int) -> np.ndarray:
        """Read ``length`` tokens from token ``offset``, in the dtype of the file.

        Raises:
            HydraError: the file ends too early.
        """
        wanted, blocks = length * self.itemsize, []
        begin = offset * self.itemsize
        while wanted:
            block = os.pread(self._tokens.fileno(), wanted, begin)
            if not block:
                raise HydraError(
                    f"{self.prefix}.bin ends at byte {begin:,}, but it was complete when it was opened; it may "
                    "have been changed since"
                )
            blocks.append(block)
            begin += len(block)
            wanted -= len(block)
        return np.frombuffer(b"".join(blocks), dtype=self.dtype)

    def read(self, offset: int, length: int) -> np.ndarray:
        """Read ``length`` tokens from token ``offset``, as int64 ``[length]``."""
        return self.read_raw(offset, length).astype(np.int64)

    def read_piece(self, offset: int, length: int) -> Document:
        """Read ``length`` tokens of one document from token ``offset``, with their loss mask."""
        tokens = self.read(offset, length)
        if not self.learned_spans:
            return Document.all_trainable(tokens)
        pointers, lengths = self._mapped["pointers"], self._mapped["lengths"]
        modes = self._mapped["modes"]
        sequence = bisect.bisect_right(pointers, offset * self.itemsize) - 1
        skipped = offset - int(pointers[sequence]) // self.itemsize
        spans: list[np.ndarray] = []
        covered = -skipped
        while covered < length:
            count = int(lengths[sequence])
            spans.append(np.full(count, modes[sequence] == 1))
            covered += count
            sequence += 1
        return Document(tokens, np.concatenate(spans)[skipped : skipped + length])

    def max_token_id(self) -> int:
        """The largest token id, from the manifest, or without one by reading the whole ``.bin``."""
        if self.manifest is not None and "max_token_id" in self.manifest.counts:
            return self.manifest.counts["max_token_id"]
        total = self.num_tokens
        return max(
            int(self.read_raw(start, min(_CHUNK, total - start)).max())
            for start in range(0, total, _CHUNK)
        )


def _read_header(prefix: str) -> tuple[type[np.generic], int, int, bool]:
    """Read dtype, sequences, document boundaries and presence of modes; check the file sizes."""
    path = prefix + ".idx"
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        head = stream.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES or head[:9] != HEADER:
        raise HydraError(f"{path} is not a Megatron index (bad header); check the path")
    version, code, sequences, boundaries = struct.unpack("<QBQQ", head[9:])
    if version != 1 or code not in DTYPE_CODES:
        raise HydraError(f"{path}: version {version}, dtype code {code} is not supported")
    plain = HEADER_BYTES + 12 * sequences + 8 * boundaries
    if size not in (plain, plain + sequences):
        raise HydraError(
            f"{path} is {'truncated' if size < plain else 'damaged'}: {size:,} bytes, its header "
            f"says {plain:,}; copy or prepare it again"
        )
    if sequences == 0 or os.path.getsize(prefix + ".bin") == 0:
        raise HydraError(f"{prefix}.bin is empty: it has no tokens; remove it from data.blend")
    return DTYPE_CODES[code], sequences, boundaries, sequences > 0 and size == plain + sequences


def write_index(
    path: str,
    dtype: type[np.generic],
    lengths: np.ndarray | OnDisk,
    documents: np.ndarray | OnDisk,
    modes: np.ndarray | OnDisk | None = None,
) -> None:
    """Write ``.idx`` with the same bytes as Megatron-Core's builder, but faster.

    It needs memory for one block, for any length: columns may be :class:`OnDisk`.

    Args:
        path: the file; written to a temporary file in the same folder first.
        dtype: dtype of the tokens in ``.bin``.
        lengths: ``[n]`` tokens per sequence.
        documents: ``[d]`` document boundaries: 0, …, n.
        modes: ``[n]`` int8, or ``None``.
    """
    code = next(code for code, kind in DTYPE_CODES.items() if kind is dtype)
    with atomic_file(path) as temporary, open(temporary, "wb") as stream:
        stream.write(HEADER + struct.pack("<QBQQ", 1, code, len(lengths), len(documents)))
        for block in _blocks(lengths):
            stream.write(block.astype("<i4").tobytes())
        start = 0
        for block in _blocks(lengths):
            ends = start + np.cumsum(block, dtype=np.int64) * np.dtype(dtype).itemsize
            pointers = np.empty(len(block), dtype="<i8")
            pointers[0], pointers[1:] = start, ends[:-1]
            stream.write(pointers.tobytes())
            start = int(ends[-1])
        for block in _blocks(documents):
            stream.write(block.astype("<i8").tobytes())
        for block in _blocks(modes) if modes is not None else ():
            stream.write(block.astype("i1").tobytes())


def _blocks(array: np.ndarray | OnDisk) -> Iterator[np.ndarray]:
    for start in range(0, len(array), _BLOCK):
        yield array[start : start + _BLOCK]


class OnDisk:
    """A column in a separate file; only the requested slices are in memory."""

    def __init__(self, path: str | os.PathLike[str], kind: type[np.generic]) -> None:
        """Set the file, which is opened again for every slice."""
        self.path, self.kind = path, kind

    def __len__(self) -> int:
        return os.path.getsize(self.path) // np.dtype(self.kind).itemsize

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(len(self))
        offset = start * np.dtype(self.kind).itemsize
        return np.fromfile(self.path, self.kind, max(0, stop - start), offset=offset)


def write_boundaries(counts: OnDisk, path: str | os.PathLike[str]) -> OnDisk:
    """Turn the number of sequences of every document into boundaries 0, …, n, block by block.

    Args:
        counts: ``[d]``, number of sequences.
        path: file for the ``[d + 1]`` int64 boundaries.
    """
    last = 0
    with open(path, "wb") as stream:
        stream.write(np.zeros(1, np.int64).tobytes())
        for block in _blocks(counts):
            ends = last + np.cumsum(block, dtype=np.int64)
            stream.write(ends.tobytes())
            last = int(ends[-1])
    return OnDisk(path, np.int64)
