"""The packing of a source, built once and stored on disk: three ``.npy`` files and their description.

The folder's name contains the fingerprint of everything that the packing depends on, so a changed source,
length or option never uses an old index. The index is written to a temporary folder and renamed. A file lock
ensures that only one of several concurrent processes (ranks) builds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hydra.data.held_out import Side, documents_of_side
from megatron_hydra.data.indexed import IndexedDocuments
from megatron_hydra.data.manifest import file_probe
from megatron_hydra.data.packing import Packing, Packs, pack_documents, upsample
from megatron_hydra.errors import HydraError
from megatron_hydra.files import sync_tree, write_json_atomic

VERSION = 2
_ARRAYS = ("starts", "offsets", "lengths")
_log = logging.getLogger(__name__)


def pack_index(
    source: IndexedDocuments,
    *,
    sequence_length: int,
    packing: Packing,
    seed: int,
    upsampling: dict[int, float],
    cache_dir: str = "",
    side: Side | None = None,
) -> tuple[Packs, dict[str, Any]]:
    """Load the packs of a source from the cache, or build them.

    Args:
        source: the documents.
        sequence_length, packing, seed, upsampling: see :mod:`megatron_hydra.data.packing`.
        cache_dir: folder of indices; empty: ``<folder of the source>/.packs``.
        side: the side of held-out data to pack; ``None``: pack all documents.

    Returns:
        The packs (memory-mapped) and their description: ``key`` (of the inputs), ``arrays`` (probes of the
        files), ``max_token_id`` and ``report`` (documents, pieces, packs, tokens, waste …).

    Raises:
        HydraError: the source cannot be packed with these options, or the cache cannot be written.
    """
    recipe = {
        "version": VERSION,
        "source": source.fingerprint(),
        "sequence_length": sequence_length,
        "packing": packing,
        "seed": seed,
        "upsample": sorted(upsampling.items()),
    }
    if side is not None:
        recipe["held_out"] = [side.held_out, side.is_validation]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:24]
    root = Path(cache_dir) if cache_dir else Path(source.prefix).parent / ".packs"
    folder = root / f"{Path(source.prefix).name}-{sequence_length}-{packing}-{key}"
    try:
        # The index is complete, because it was renamed. This also works on a read-only disk.
        if (folder / "pack.json").exists():
            return _load(folder, sequence_length)
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{folder.name}.lock"):
            if not (folder / "pack.json").exists():
                _log.info("packing %s into sequences of %d tokens", source.prefix, sequence_length)
                _build(source, recipe, upsampling, side, folder)
    except OSError as error:
        raise HydraError(
            f"cannot write the packing index {folder}: {error}; set data.cache_dir to a writable folder "
            "with enough space"
        ) from error
    return _load(folder, sequence_length)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _build(
    source: IndexedDocuments,
    recipe: dict[str, Any],
    upsampling: dict[int, float],
    side: Side | None,
    folder: Path,
) -> None:
    packs, report = pack_source(
        source,
        sequence_length=recipe["sequence_length"],
        packing=recipe["packing"],
        seed=recipe["seed"],
        upsampling=upsampling,
        side=side,
    )
    temporary = folder.with_name(f".{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name in _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(packs, name), allow_pickle=False)
        description = {
            "recipe": recipe,
            "key": folder.name.rsplit("-", 1)[1],
            "arrays": {name: file_probe(temporary / f"{name}.npy") for name in _ARRAYS},
            "max_token_id": source.max_token_id(),
            "report": report,
        }
        write_json_atomic(temporary / "pack.json", description)
        sync_tree(temporary)
        _publish_index(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish_index(temporary: Path, folder: Path) -> None:
    """Rename the new index, unless another node has finished one (not all file systems can lock)."""
    if not (folder / "pack.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not (folder / "pack.json").exists():
                raise


def pack_source(
    source: IndexedDocuments,
    *,
    sequence_length: int,
    packing: Packing,
    seed: int,
    upsampling: dict[int, float],
    side: Side | None = None,
) -> tuple[Packs, dict[str, Any]]:
    """Pack a source without a cache; return the packs and a report of numbers."""
    offsets, lengths = source.document_spans()
    documents = int((lengths > 0).sum())
    report: dict[str, Any] = {"documents": documents, "empty_documents": len(lengths) - documents}
    report["tokens_in_source"] = int(lengths.sum())
    is_ours = np.ones(len(lengths), dtype=bool)
    if side is not None:
        is_ours = documents_of_side(len(lengths), side)
        report["documents_of_side"] = int((is_ours & (lengths > 0)).sum())
    if upsampling:
        chosen = upsample(lengths, upsampling, seed, source.prefix)
        times = np.bincount(chosen, minlength=len(lengths))
        report["documents_repeated"] = int((times > 1).sum())
        report["documents_dropped"] = int(((times == 0) & (lengths > 0)).sum())
        offsets, lengths = offsets[chosen], lengths[chosen]
        is_ours = is_ours[chosen]
    if side is not None:
        lengths = np.where(is_ours, lengths, 0)
        side.check_not_empty(source.prefix, int((lengths > 0).sum()), documents)
    name = f"{source.prefix}.bin"
    packs = pack_documents(offsets, lengths, sequence_length, packing, seed, name)
    report["documents_per_epoch"] = int((lengths > 0).sum())
    report["tokens_per_epoch"] = int(lengths.sum())
    report["pieces"] = len(packs.offsets)
    report["packs"] = len(packs)
    report["documents_above_length"] = int((lengths > sequence_length).sum())
    report["waste"] = packs.waste()
    return packs, report


def _load(folder: Path, sequence_length: int) -> tuple[Packs, dict[str, Any]]:
    try:
        description = json.loads((folder / "pack.json").read_text(encoding="utf-8"))
        starts, offsets, lengths = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS
        )
        probes = {name: file_probe(folder / f"{name}.npy") for name in _ARRAYS}
        if probes != description["arrays"]:
            raise ValueError("an array differs from pack.json")
        report = description["report"]
        if (len(starts), len(offsets), len(lengths)) != (
            report["packs"] + 1,
            report["pieces"],
            report["pieces"],
        ):
            raise ValueError("arrays and pack.json disagree")
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise HydraError(
            f"{folder}: damaged packing index ({error}); delete this folder"
        ) from error
    return Packs(starts, offsets, lengths, sequence_length), description
