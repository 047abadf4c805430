"""The files below ``weights/``: records of parts (boxes) of global tensors, and their index.

The format is ``torch.distributed.checkpoint`` (``torch_dist`` in Megatron), so torch and Megatron can read
the files. A record is the output of ``torch.save`` for one tensor. A file is a sequence of records.
``.metadata`` holds the place of each record. This module writes and hashes files, writes the index, and
reads any boxes, also if other boxes were written. It needs no process group: the caller assigns the boxes
to ranks.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch

from megatron_hydra.checkpoint.canonical import Shape
from megatron_hydra.checkpoint.integrity import COMMON_FILE, INDEX_FILE, read_index
from megatron_hydra.errors import HydraError
from megatron_hydra.files import atomic_file

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

RECORD_BYTES = 16 * 2**20
"""Approximate maximum size of a record. A rank reads a whole record even if it needs only a part; but every
record, however small, costs a fraction of a millisecond."""

_CONFIG_FILE = "metadata.json"
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_READING_THREADS = min(4, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Box:
    """A part of a global tensor.

    Attributes:
        key: the tensor's name.
        offset, shape: position and size of the part in the global tensor.
        global_shape: shape of the whole tensor.
        dtype: dtype in the file.
    """

    key: str
    offset: Shape
    shape: Shape
    global_shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Place:
    """Place of a record: file name, offset and length in bytes."""

    file: str
    offset: int
    length: int


def records_of(box: Box) -> list[Box]:
    """A box cut along its first axis into boxes of about :data:`RECORD_BYTES`, one record each."""
    if not box.shape or box.num_bytes <= RECORD_BYTES:
        return [box]
    rows, *rest = box.shape
    step = max(1, RECORD_BYTES * rows // box.num_bytes)
    return [
        dataclasses.replace(
            box,
            offset=(box.offset[0] + start, *box.offset[1:]),
            shape=(min(step, rows - start), *rest),
        )
        for start in range(0, rows, step)
    ]


# -- writing -------------------------------------------------------------------------------------


class _HashedFile:
    """A file for ``torch.save`` that computes its SHA-256 while writing. torch only appends."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.position = 0

    def write(self, data: Any) -> int:
        """Append bytes or an object with the buffer protocol."""
        self._file.write(data)
        self._hash.update(data)
        size = memoryview(data).nbytes
        self.position += size
        return size

    def flush(self) -> None:
        """See :meth:`io.IOBase.flush`; torch calls it after every record."""
        self._file.flush()

    def digest(self) -> str:
        """Hex digest of the written bytes."""
        return self._hash.hexdigest()


def write_record(file: _HashedFile, tensor: torch.Tensor) -> None:
    """Append one record: only the tensor, even if its storage is larger."""
    torch.save(_compact_cpu_copy(tensor), file)  # type: ignore[arg-type]


def _compact_cpu_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same values on the CPU in a storage of exactly their size; copied only if needed."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes or not tensor.numel():
        return tensor if tensor.numel() else tensor.clone()
    flat = tensor.view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(flat).view(tensor.dtype).view(tensor.shape)


def write_file(path: Path, tensors: Iterable[torch.Tensor]) -> tuple[list[Place], str]:
    """Write one file of records and sync it to disk.

    Returns:
        The place of every record, and the file's SHA-256.
    """
    places = []
    with open(path, "wb") as file:
        hashed = _HashedFile(file)
        for tensor in tensors:
            start = hashed.position
            write_record(hashed, tensor)
            places.append(Place(path.name, start, hashed.position - start))
            # Free it before the next one is made; it may be the last view of a large tensor.
            del tensor
        file.flush()
        os.fsync(file.fileno())
    return places, hashed.digest()


# -- the index -----------------------------------------------------------------------------------


def check_cover(boxes: Iterable[Box]) -> dict[str, list[Box]]:
    """Return boxes by key, in order. Check that the boxes of every tensor cover it without overlap.

    Raises:
        HydraError: names the first key whose boxes do not.
    """
    by_key: dict[str, list[Box]] = collections.defaultdict(list)
    for box in boxes:
        by_key[box.key].append(box)
    for key, parts in by_key.items():
        parts.sort(key=lambda box: box.offset)
        whole = parts[0]
        if any((b.global_shape, b.dtype) != (whole.global_shape, whole.dtype) for b in parts):
            raise HydraError(f"ranks disagree on the shape or dtype of {key!r}")
        if sum(math.prod(b.shape) for b in parts) != math.prod(whole.global_shape) or any(
            _overlap(one, other) is not None for one, other in itertools.combinations(parts, 2)
        ):
            raise HydraError(
                f"the parts of {key!r} on the ranks do not cover each element exactly once"
            )
    return dict(by_key)


def _overlap(one: Box, other: Box) -> tuple[slice, ...] | None:
    """The overlap of two boxes of a tensor, in global coordinates; ``None`` if empty."""
    shared = []
    for a, n, b, m in zip(one.offset, one.shape, other.offset, other.shape, strict=True):
        start, end = max(a, b), min(a + n, b + m)
        if start >= end:
            return None
        shared.append(slice(start, end))
    return tuple(shared)


def write_index(
    weights: Path, boxes: Mapping[str, Sequence[Box]], places: Mapping[Box, Place]
) -> None:
    """Write ``.metadata`` and ``metadata.json``.

    Args:
        boxes: the boxes of every tensor, from :func:`check_cover`.
        places: the place of each box.
    """
    from torch.distributed.checkpoint import metadata as parts
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries, storage = {}, {}
    for key, of_key in boxes.items():
        whole = of_key[0]
        entries[key] = parts.TensorStorageMetadata(
            parts.TensorProperties(dtype=whole.dtype),
            torch.Size(whole.global_shape),
            [
                parts.ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
                for box in of_key
            ],
        )
        for number, box in enumerate(of_key):
            place = places[box]
            storage[parts.MetadataIndex(key, box.offset, number)] = _StorageInfo(
                place.file, place.offset, place.length
            )
    with atomic_file(weights / INDEX_FILE) as temporary:
        temporary.write_bytes(pickle.dumps(parts.Metadata(entries, storage_data=storage)))  # type: ignore[arg-type]
    (weights / _CONFIG_FILE).write_text(json.dumps(_CONFIG))


def write_common(weights: Path, common: Mapping[str, Any]) -> None:
    """Write ``common.pt``: all state except sharded tensors. Plain tensors in it are moved to the CPU."""
    buffer = io.BytesIO()  # not a path: torch would hide the error of the operating system
    torch.save(_on_the_host(common), buffer)
    (weights / COMMON_FILE).write_bytes(buffer.getbuffer())


def _on_the_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_the_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_the_host(item) for item in value)
    return value


# -- reading -------------------------------------------------------------------------------------


def read_boxes(
    weights: Path, wanted: Sequence[tuple[Box, torch.Tensor]], index: Metadata | None = None
) -> None:
    """Fill tensors from the records. Each record is read once.

    Args:
        weights: the folder, which must be verified.
        wanted: boxes, and for each box a tensor of its shape, of any dtype and device.
        index: the index of the folder, if it was read before.

    Raises:
        HydraError: a tensor is missing, incomplete or of another shape; or a record is not a tensor
            of the shape in the index.
    """
    index = index or read_index(weights)
    todo: dict[MetadataIndex, list[tuple[Box, Box, torch.Tensor]]] = {}
    chunks: dict[str, list[tuple[MetadataIndex, Box]]] = {}
    for box, tensor in wanted:
        if box.key not in chunks:
            chunks[box.key] = list(_stored_boxes(index, box, weights))
        found = 0
        for place, stored in chunks[box.key]:
            shared = _overlap(stored, box)
            if shared is not None:
                found += math.prod(part.stop - part.start for part in shared)
                todo.setdefault(place, []).append((stored, box, tensor))
        if found != math.prod(box.shape):
            raise HydraError(f"{weights}: part of {box.key!r} is not in the checkpoint")
    order = sorted(todo, key=lambda place: _file_and_offset(index, place))

    def read(place: MetadataIndex) -> None:
        _read_record(weights, index.storage_data[place], todo[place])

    with concurrent.futures.ThreadPoolExecutor(_READING_THREADS, "read") as pool:
        for _ in pool.map(read, order):
            pass


def _stored_boxes(index: Metadata, box: Box, weights: Path) -> Iterator[tuple[MetadataIndex, Box]]:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    entry: Any = index.state_dict_metadata.get(box.key)
    if entry is None:
        raise HydraError(f"{weights}: the checkpoint has no tensor {box.key!r}")
    shape = tuple(entry.size)
    if shape != box.global_shape:
        raise HydraError(
            f"{weights}: {box.key!r} has shape {list(shape)}, this run needs "
            f"{list(box.global_shape)}"
        )
    for chunk in entry.chunks:
        place = MetadataIndex(box.key, chunk.offsets)
        if place not in index.storage_data:
            raise HydraError(f"{weights}: the index has no place for a part of {box.key!r}")
        stored = tuple(chunk.offsets), tuple(chunk.sizes)
        yield place, Box(box.key, *stored, shape, entry.properties.dtype)


def _file_and_offset(index: Metadata, place: MetadataIndex) -> tuple[str, int]:
    info = index.storage_data[place]
    return info.relative_path, info.offset


def _read_record(weights: Path, info: Any, parts: list[tuple[Box, Box, torch.Tensor]]) -> None:
    from torch.distributed._shard._utils import narrow_tensor_by_index
    from torch.distributed.checkpoint.filesystem import _create_file_view

    stored = parts[0][0]
    path = weights / info.relative_path
    with open(path, "rb") as file:
        view = cast(IO[bytes], _create_file_view(file, info.offset, info.length))
        try:
            record = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or forged pickle can raise almost any error
            raise HydraError(f"{path}: {stored.key!r}: {error}") from None
    if not isinstance(record, torch.Tensor) or tuple(record.shape) != stored.shape:
        raise HydraError(f"{path}: {stored.key!r} is not a tensor of the shape in the index")
    for _, box, tensor in parts:
        shared = _overlap(stored, box)
        assert shared is not None
        sizes = [part.stop - part.start for part in shared]
        source = narrow_tensor_by_index(
            record, [part.start - a for part, a in zip(shared, stored.offset, strict=True)], sizes
        )
        target = narrow_tensor_by_index(
            tensor.detach(), [p.start - a for p, a in zip(shared, box.offset, strict=True)], sizes
        )
        target.copy_(source)
