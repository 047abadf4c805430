"""Merge ``.bin/.idx`` pairs by concatenating files, without decoding tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hydra.data.indexed import IndexedDocuments, OnDisk, write_boundaries, write_index
from megatron_hydra.data.manifest import FileRecord, Manifest, file_record
from megatron_hydra.data.parts import Counts, publish
from megatron_hydra.data.tokenize_config import shard_prefix
from megatron_hydra.errors import HydraError
from megatron_hydra.files import sha256_of_file

_COPY_BYTES = 16 << 20


def find_shards(output: str) -> list[str]:
    """Prefixes of all shards of ``output``, in order.

    Raises:
        HydraError: no shards exist, they have different counts, or some are missing.
    """
    pattern = re.compile(re.escape(output) + r"-(\d{5})-of-(\d{5})\.json$")
    found = [
        pattern.match(path) for path in sorted(glob.glob(glob.escape(output) + "-*-of-*.json"))
    ]
    names = [match for match in found if match is not None]
    counts = {int(match[2]) for match in names}
    if len(counts) != 1:
        raise HydraError(
            f"--shards {output}: found {'no shards' if not counts else f'shards of {counts}'}; "
            "finish data_prep/tokenize.py --shard for one count, or list the prefixes with --input"
        )
    (count,) = counts
    present = {int(match[1]) for match in names}
    missing = sorted(set(range(count)) - present)
    if missing:
        raise HydraError(
            f"--shards {output}: shard{'s' if len(missing) > 1 else ''} "
            f"{', '.join(map(str, missing[:20]))} of {count} not finished; run "
            f"data_prep/tokenize.py --shard {missing[0]}/{count}"
        )
    return [shard_prefix(output, index, count) for index in range(count)]


def merge(
    prefixes: list[str], output: str, *, shards: bool = False, force: bool = False
) -> Manifest:
    """Join pairs in the given order.

    Args:
        prefixes: inputs, each with a manifest.
        output: prefix to write.
        shards: check that the inputs are all shards of one preparation, in order.
        force: replace an existing output.

    Raises:
        HydraError: an input is damaged, or was made with another tokenizer or loss; shards do not
            fit together; the output exists; or the disk is full.
    """
    existing = [output + s for s in (".bin", ".idx", ".json") if os.path.exists(output + s)]
    if existing and not force:
        raise HydraError(f"{existing[0]} exists; choose another --output or replace with --force")
    inputs = [IndexedDocuments(prefix) for prefix in prefixes]
    manifests = [_manifest_of(documents, inputs[0]) for documents in inputs]
    if shards:
        _check_shards(prefixes, manifests)
    work = Path(output + ".merge")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        bin_record = _join_tokens(prefixes, manifests, work / "all.bin")
        idx_record = _join_indices(inputs, manifests, work / "all.idx")
        counts = Counts()
        for manifest in manifests:
            counts.add(Counts(**manifest.counts))
        merged = Manifest(
            _merged_source(prefixes, manifests),
            manifests[0].tokenizer,
            dataclasses.asdict(counts),
            manifests[0].loss,
            bin_record,
            idx_record,
        )
        merged.save(work / "manifest.json")
        publish(work, output)
    except OSError as error:
        full = "the disk is full; " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise HydraError(
            f"cannot write {output}: {full}{error}; the inputs are untouched. Fix this and run the same "
            "command again"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return merged


def _manifest_of(documents: IndexedDocuments, first: IndexedDocuments) -> Manifest:
    """The manifest of an input. Check that it agrees with the first input's manifest."""
    own, reference = documents.manifest, first.manifest
    if own is None or reference is None:
        name = documents.prefix if own is None else first.prefix
        raise HydraError(f"{name}.json does not exist; only data with a manifest can be merged")
    if own.tokenizer["fingerprint"] != reference.tokenizer["fingerprint"]:
        raise HydraError(
            f"{documents.prefix}.json: tokenizer {own.tokenizer['name']!r} is not the one of "
            f"{first.prefix}.json ({reference.tokenizer['name']!r}); prepare one of them again"
        )
    if own.loss != reference.loss or documents.dtype is not first.dtype:
        raise HydraError(
            f"{documents.prefix} and {first.prefix} differ in loss ({own.loss}, {reference.loss}) "
            "or token type; blend them in training instead (data.blend)"
        )
    return own


def _check_shards(prefixes: list[str], manifests: list[Manifest]) -> None:
    """Check that shards come from the same units and options."""
    for index, key, own, wanted in _find_mismatches(manifests):
        raise HydraError(
            f"{prefixes[index]}.json: {key} is {own!r}, but {prefixes[0]}.json requires {wanted!r}: "
            "these are not shards of one preparation; prepare one of them again with the inputs, options "
            "and --unit-size of the other"
        )


def _find_mismatches(manifests: list[Manifest]) -> Iterator[tuple[int, str, Any, Any]]:
    """Find reasons why the inputs are not all shards of one preparation, in order.

    Yields:
        Number of the input, key, its value, and the value required by the first input.
    """
    first = {"shard.units": "a list of units", **_flat_source(manifests[0])}
    for index, manifest in enumerate(manifests):
        wanted = {**first, "shard.index": index, "shard.count": len(manifests)}
        own = _flat_source(manifest)
        for key in sorted(wanted.keys() | own.keys()):
            if own.get(key) != wanted.get(key):
                yield index, key, own.get(key), wanted.get(key)


def _flat_source(manifest: Manifest) -> dict[str, Any]:
    """The source without shard-specific keys, and the place of the shard."""
    source = {key: value for key, value in manifest.source.items() if key != "shard"}
    place = {f"shard.{key}": value for key, value in manifest.source.get("shard", {}).items()}
    return {**source, **place, "tokenizer.eod_id": manifest.tokenizer.get("eod_id")}


def _merged_source(prefixes: list[str], manifests: list[Manifest]) -> dict[str, Any]:
    """The source of the output: for all shards of a preparation its source, else the list of inputs."""
    first = manifests[0].source
    limited = first.get("max_tokens")  # then each shard ends early
    if not limited and not any(_find_mismatches(manifests)):
        return {key: value for key, value in first.items() if key != "shard"}
    parts = zip(prefixes, manifests, strict=True)
    return {
        "merged": [
            {"name": os.path.basename(prefix), "sha256": m.bin.sha256, **m.source}
            for prefix, m in parts
        ]
    }


def _join_tokens(prefixes: list[str], manifests: list[Manifest], path: Path) -> FileRecord:
    """Concatenate ``.bin`` files, and check each against its manifest."""
    whole = hashlib.sha256()
    with open(path, "wb") as stream:
        for prefix, manifest in zip(prefixes, manifests, strict=True):
            own = hashlib.sha256()
            with open(prefix + ".bin", "rb") as source:
                while block := source.read(_COPY_BYTES):
                    stream.write(block)
                    whole.update(block)
                    own.update(block)
            _check_sha256(prefix, ".bin", own.hexdigest(), manifest.bin)
        stream.flush()
        os.fsync(stream.fileno())
    return file_record(path, whole.hexdigest())


def _check_sha256(prefix: str, suffix: str, found: str, record: FileRecord) -> None:
    if found != record.sha256:
        raise HydraError(
            f"the SHA-256 of {prefix}{suffix} differs from {prefix}.json; the file is damaged: copy or "
            "prepare it again"
        )


def _join_indices(
    inputs: list[IndexedDocuments], manifests: list[Manifest], path: Path
) -> FileRecord:
    """Write one index for all inputs, and check each input's index against its manifest.

    Columns are joined on disk, one input at a time.
    """
    columns = {name: path.with_suffix(f".{name}") for name in ("len", "doc", "mode")}
    has_modes = inputs[0].sequence_modes() is not None
    with contextlib.ExitStack() as held:
        streams = {n: held.enter_context(open(file, "wb")) for n, file in columns.items()}
        for documents, manifest in zip(inputs, manifests, strict=True):
            prefix = documents.prefix
            _check_sha256(prefix, ".idx", sha256_of_file(prefix + ".idx"), manifest.idx)
            streams["len"].write(documents.sequence_lengths().astype(np.int32).tobytes())
            counts = np.diff(documents.document_boundaries())
            streams["doc"].write(counts.astype(np.int32).tobytes())
            if has_modes:
                modes = documents.sequence_modes()
                assert modes is not None  # all have the same loss
                streams["mode"].write(modes.astype(np.int8).tobytes())
    write_index(
        str(path),
        inputs[0].dtype,
        OnDisk(columns["len"], np.int32),
        write_boundaries(OnDisk(columns["doc"], np.int32), path.with_suffix(".end")),
        OnDisk(columns["mode"], np.int8) if has_modes else None,
    )
    return file_record(path)
