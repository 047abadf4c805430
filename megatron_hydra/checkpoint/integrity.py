"""Check that a checkpoint folder is unchanged and safe to open.

Three independent checks:

- The manifest holds SHA-256 and size of every file and a digest of itself. It shows a change of any byte of
  the folder. It is not a signature: anyone who can write to the folder can write a matching manifest.
- The index ``weights/.metadata`` is a pickle that torch always opens without ``weights_only``. We read it
  first, with an unpickler that accepts only the dozen classes of an index. The index may list only tensors,
  which torch reads with ``weights_only=True``; torch would unpickle objects without it. All files that the
  index names must be in the folder.
- ``common.pt`` is read only here, with ``weights_only=True``.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.files import JsonFormat, sha256_of_file, write_text_atomic

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

MANIFEST = JsonFormat(
    "megatron-hydra-manifest",
    2,
    "checkpoint manifest",
    "make the checkpoint again with this release",
)
MANIFEST_FILE = "manifest.json"
WEIGHTS = "weights"
INDEX_FILE, COMMON_FILE = ".metadata", "common.pt"
"""Below ``weights/``."""

_NO_DIGEST = "0" * 64
_DIGEST = re.compile(r'"digest": "([0-9a-f]{64})"')
_HASHING_THREADS = min(8, os.cpu_count() or 1)

ALLOWED_GLOBALS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"Path", "PosixPath"},
}
"""The only names that ``weights/.metadata`` may refer to. Other names are refused before their import.

``BytesStorageMetadata`` is not allowed: torch unpickles such an entry without a guard, and our checkpoints
contain only tensors.
"""


# -- manifest ------------------------------------------------------------------------------------


def _hashes(paths: Iterable[Path]) -> list[str]:
    """Digests of several files, in threads: hashing releases the interpreter lock."""
    with concurrent.futures.ThreadPoolExecutor(_HASHING_THREADS, "hash") as pool:
        return list(pool.map(sha256_of_file, paths))


def _files(folder: Path) -> dict[str, Path]:
    """Name in the manifest -> path, for all files of a checkpoint except the manifest.

    Raises:
        HydraError: a file is a symbolic link, which could point outside the folder.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise HydraError(
                f"{path} is a symbolic link: a checkpoint holds its own files; copy the target there"
            )
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST_FILE:
            found[name] = path
    return found


def write_manifest(
    folder: str | os.PathLike[str],
    provenance: Mapping[str, Any] | None = None,
    known: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write ``manifest.json`` over every file that ``folder`` now holds; returns its content.

    Args:
        provenance: JSON-able facts about the origin of the checkpoint.
        known: name -> SHA-256 of files that were hashed when they were written.
    """
    folder = Path(folder)
    files = _files(folder)
    hashes = dict(known or {})
    unknown = [name for name in files if name not in hashes]
    hashes.update(zip(unknown, _hashes(files[name] for name in unknown), strict=True))
    body = {
        "digest": _NO_DIGEST,
        **MANIFEST.add_header({}),
        "files": {
            name: {"sha256": hashes[name], "bytes": path.stat().st_size}
            for name, path in files.items()
        },
        "provenance": dict(provenance or {}),
    }
    text = json.dumps(body, indent=1) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text_atomic(folder / MANIFEST_FILE, text.replace(_NO_DIGEST, digest, 1))
    return body | {"digest": digest}


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        HydraError: the manifest is missing, damaged, or of another format or version.
    """
    path = Path(folder) / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
        body = json.loads(text)
    except FileNotFoundError:
        raise HydraError(
            f"{path} is missing: the checkpoint is incomplete or not one of ours"
        ) from None
    except (OSError, ValueError) as error:
        raise HydraError(f"{path} is damaged: {error}") from None
    MANIFEST.without_header(body, path)
    found = _DIGEST.search(text)
    blank = text.replace(found[1], _NO_DIGEST, 1) if found else text
    if not found or hashlib.sha256(blank.encode()).hexdigest() != found[1]:
        raise HydraError(f"{path} was changed: its text does not have the digest that it states")
    if not isinstance(body.get("files"), dict):
        raise HydraError(f"{path}: key 'files' is missing")
    for name, entry in body["files"].items():
        _check_entry(path, name, entry)
    return body


def _check_entry(path: Path, name: str, entry: Any) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or not parts.parts or ".." in parts.parts or "\\" in name:
        raise HydraError(f"{path} lists {name!r}, which is not a file inside the checkpoint")
    if not isinstance(entry, dict) or not {"sha256", "bytes"} <= entry.keys():
        raise HydraError(f"{path}: the entry of {name!r} lacks sha256 or bytes")


def verify_manifest(folder: str | os.PathLike[str], *, sizes_only: bool = False) -> dict[str, Any]:
    """Check that a checkpoint is unchanged; return its manifest.

    Args:
        sizes_only: compare only names and sizes. This is quick; it finds truncation but not tampering.

    Raises:
        HydraError: naming the first file that is missing, unlisted, or changed.
    """
    folder = Path(folder)
    body = read_manifest(folder)
    present = _files(folder)
    for name in body["files"]:
        if name not in present:
            raise HydraError(f"{folder / name} is missing, the manifest lists it")
    for name, path in present.items():
        if name not in body["files"]:
            raise HydraError(f"{path} is not listed in the manifest")
    changed = [
        name
        for name, path in present.items()
        if path.stat().st_size != body["files"][name]["bytes"]
    ]
    if not changed and not sizes_only:
        hashes = zip(present, _hashes(present.values()), strict=True)
        changed = [name for name, digest in hashes if digest != body["files"][name]["sha256"]]
    if changed:
        raise HydraError(
            f"{present[changed[0]]} is not the file that the manifest describes: it was changed"
        )
    return body


# -- pickles -------------------------------------------------------------------------------------


class _IndexUnpickler(pickle.Unpickler):
    """Resolves only :data:`ALLOWED_GLOBALS`, and detects if the pickle changes one of them.

    It is the C unpickler, like torch's: another parser could read the same bytes differently.
    """

    def __init__(self, file: Any, source: Path) -> None:
        super().__init__(file)
        self._source = source
        self._resolved: dict[type, dict[str, Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED_GLOBALS.get(module, ()):
            raise HydraError(
                f"{self._source} refers to {module}.{name}, which our checkpoints never use: the file is "
                "not opened"
            )
        found = super().find_class(module, name)
        if isinstance(found, type):
            self._resolved.setdefault(found, dict(vars(found)))
        return found

    def load(self) -> Any:
        try:
            return super().load()
        finally:
            self._check_classes_unchanged()

    def _check_classes_unchanged(self) -> None:
        """Raise if the pickle changed a class: a pickle can set attributes of anything that it refers to."""
        changed = [kind for kind, before in self._resolved.items() if dict(vars(kind)) != before]
        for kind in changed:
            before = self._resolved[kind]
            for name in vars(kind).keys() - before.keys():
                delattr(kind, name)
            for name in before:
                if vars(kind)[name] is not before[name]:
                    setattr(kind, name, before[name])
        if changed:
            raise HydraError(
                f"{self._source} changes the class {changed[0].__name__}: it is not opened"
            )


def read_index(weights: str | os.PathLike[str]) -> Metadata:
    """``weights/.metadata``, read with :data:`ALLOWED_GLOBALS` only.

    Returns:
        The index: tensors only, each piece in a file of the folder.

    Raises:
        HydraError: the file is missing, broken, refers to anything else, lists anything but
            tensors, or names a file outside the folder.
    """
    path = Path(weights) / INDEX_FILE
    try:
        with open(path, "rb") as file:
            index = _IndexUnpickler(file, path).load()
        _check_index(index, path)
    except FileNotFoundError:
        raise HydraError(
            f"{path} is missing: {weights} is not a dist_checkpointing folder"
        ) from None
    except HydraError:
        raise
    except Exception as error:  # a damaged pickle can raise almost any error
        raise HydraError(f"{path} is damaged: {error}") from None
    return index


def _check_index(index: Any, path: Path) -> None:
    """Check that the index has exactly torch's classes, so that torch reads the same index as we do.

    torch distinguishes tensors from objects by class. Attributes and subclasses could mislead this check.
    """
    # These imports take seconds, and most commands open no checkpoint.
    from torch.distributed.checkpoint import metadata as parts
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    _check_is(index, parts.Metadata, "the index", path)
    if index.storage_meta is not None:
        _check_is(index.storage_meta, parts.StorageMeta, "storage_meta", path)
    for key, entry in index.state_dict_metadata.items():
        _check_is(entry, parts.TensorStorageMetadata, f"the entry of {key!r}", path)
        _check_is(entry.properties, parts.TensorProperties, f"the entry of {key!r}", path)
        for chunk in entry.chunks:
            _check_is(chunk, parts.ChunkStorageMetadata, f"the entry of {key!r}", path)
    for place, info in index.storage_data.items():
        _check_is(place, parts.MetadataIndex, "a place in storage_data", path)
        _check_is(info, _StorageInfo, f"the place of {place.fqn!r}", path)
        if info.transform_descriptors is not None:
            raise HydraError(f"{path}: {place.fqn!r} is stored transformed: it is not opened")
        name = info.relative_path
        if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
            raise HydraError(f"{path} names {name!r}, which is not a file in {path.parent}")


def _check_is(value: Any, kind: type, what: str, path: Path) -> None:
    """Check that ``value`` has exactly this dataclass and no attributes besides its fields."""
    if type(value) is not kind:
        raise HydraError(
            f"{path}: {what} is a {type(value).__name__}, not a {kind.__name__}: it is not opened"
        )
    unknown = sorted(vars(value).keys() - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise HydraError(f"{path}: {what} has an attribute {unknown[0]!r}: it is not opened")


def verify_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """All three checks on a checkpoint folder; returns its manifest.

    Raises:
        HydraError: naming the file that was changed or must not be opened.
    """
    body = verify_manifest(folder)
    weights = Path(folder) / WEIGHTS
    read_index(weights)
    read_common(weights)
    return body


def read_common(weights: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``weights/common.pt``, all state except sharded tensors; tensors are on the host.

    Raises:
        HydraError: it is missing, broken, or holds more than plain data.
    """
    path = Path(weights) / COMMON_FILE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise HydraError(f"{path} is missing") from None
    except Exception as error:  # a damaged or forged pickle raises nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HydraError(f"{path} holds more than plain data and is not opened: {reason}") from None
