"""The files below ``weights/``: boxes of global tensors, one record each, and the index over them.

The format is that of ``torch.distributed.checkpoint``, which Megatron calls ``torch_dist``, so that both
can read it: a record is what ``torch.save`` makes of a tensor, a file is records one behind the other,
``.metadata`` says where each one lies. Here are writing (which hashes as it goes), the index, and reading
any boxes, whatever boxes were written. No process group is needed: who writes what, and that all ranks
do, is the matter of those who call.
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
"""About how large a record may be. It is read whole, by every rank that needs a part of it; and costs a
fraction of a millisecond, however small it is."""

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
        offset, shape: where the part lies, and how large it is.
        global_shape: of the whole tensor.
        dtype: as stored.
    """

    key: str
    offset: Shape
    shape: Shape
    global_shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a record lies: file name, offset and length in bytes."""

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
    """What ``torch.save`` writes to: a file and its SHA-256 at once. Torch only ever appends."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.position = 0

    def write(self, data: Any) -> int:
        """Append bytes, or whatever has a buffer of them."""
        self._file.write(data)
        self._hash.update(data)
        size = memoryview(data).nbytes
        self.position += size
        return size

    def flush(self) -> None:
        """See :meth:`io.IOBase.flush`; torch asks for it behind every record."""
        self._file.flush()

    def digest(self) -> str:
        """Hex digest of what was written."""
        return self._hash.hexdigest()


def write_record(file: _HashedFile, tensor: torch.Tensor) -> None:
    """Append one record: the tensor alone, also where its storage holds more."""
    torch.save(_compact_cpu_copy(tensor), file)  # type: ignore[arg-type]


def _compact_cpu_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same values on the CPU in a storage of just their size; copied only if not in a row."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes or not tensor.numel():
        return tensor if tensor.numel() else tensor.clone()
    flat = tensor.view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(flat).view(tensor.dtype).view(tensor.shape)


def write_file(path: Path, tensors: Iterable[torch.Tensor]) -> tuple[list[Place], str]:
    """Write one file of records, durably.

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
            del tensor  # it may be the last view of a large one, and the next one is made now
        file.flush()
        os.fsync(file.fileno())
    return places, hashed.digest()


# -- the index -----------------------------------------------------------------------------------


def check_cover(boxes: Iterable[Box]) -> dict[str, list[Box]]:
    """Boxes by key, in order, if those of every tensor make it whole and none overlaps.

    Raises:
        HydraError: naming the first key of which that is not so.
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
            _common(one, other) is not None for one, other in itertools.combinations(parts, 2)
        ):
            raise HydraError(
                f"the parts of {key!r} that ranks hold do not make the whole, each element once"
            )
    return dict(by_key)


def _common(one: Box, other: Box) -> tuple[slice, ...] | None:
    """What two boxes of a tensor share, in global coordinates; ``None``: nothing."""
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
        boxes: of every tensor, from :func:`check_cover`.
        places: where each one was written.
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
    """Write ``common.pt``: what is not a sharded tensor. Numbers that are tensors go to the CPU."""
    buffer = io.BytesIO()  # given a path, torch would hide what the operating system says of it
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
    """Fill tensors from the records that hold their parts, each of which is read once.

    Args:
        weights: the folder; verified.
        wanted: boxes, and a tensor of the box's shape for each, of any dtype and device.
        index: of the folder, where it was read already.

    Raises:
        HydraError: a tensor that is not there, of another shape or not complete, or a record that
            is not a tensor of the shape that the index states.
    """
    index = index or read_index(weights)
    todo: dict[MetadataIndex, list[tuple[Box, Box, torch.Tensor]]] = {}
    chunks: dict[str, list[tuple[MetadataIndex, Box]]] = {}
    for box, tensor in wanted:
        if box.key not in chunks:
            chunks[box.key] = list(_stored_boxes(index, box, weights))
        found = 0
        for place, stored in chunks[box.key]:
            shared = _common(stored, box)
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
            raise HydraError(f"{weights}: the index does not say where a part of {box.key!r} lies")
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
        except Exception as error:  # a damaged or forged pickle raises nearly anything
            raise HydraError(f"{path}: {stored.key!r}: {error}") from None
    if not isinstance(record, torch.Tensor) or tuple(record.shape) != stored.shape:
        raise HydraError(f"{path}: {stored.key!r} is not a tensor of the shape in the index")
    for _, box, tensor in parts:
        shared = _common(stored, box)
        assert shared is not None
        sizes = [part.stop - part.start for part in shared]
        source = narrow_tensor_by_index(
            record, [part.start - a for part, a in zip(shared, stored.offset, strict=True)], sizes
        )
        target = narrow_tensor_by_index(
            tensor.detach(), [p.start - a for p, a in zip(shared, box.offset, strict=True)], sizes
        )
        target.copy_(source)
