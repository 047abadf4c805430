"""Manifest of a ``.bin/.idx`` pair: the source of its tokens, and checks of its files.

``<prefix>.json`` is written by ``data_prep/tokenize.py`` and ``data_prep/merge.py``. Files made by
Megatron-LM have none and are read without it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from typing import Any

from megatron_hydra.config.loading import from_dict
from megatron_hydra.errors import HydraError
from megatron_hydra.files import JsonFormat, sha256_of_file, write_json_atomic

FORMAT = JsonFormat("megatron-hydra-tokens", 1, "data manifest", "prepare the data again")
_PROBE_BLOCK = 4096
_PROBE_COUNT = 64


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Identity of one file.

    Attributes:
        bytes: size.
        sha256: SHA-256 of the whole file, as printed by ``sha256sum``.
        probe: hash of the size and of 64 evenly spaced 4 KiB blocks, which is fast enough for every start.
    """

    bytes: int
    sha256: str
    probe: str


def _check_counts(manifest: Manifest) -> None:
    """Check the types inside the free-form parts that other code uses."""
    for key, count in manifest.counts.items():
        if not isinstance(count, int):
            raise HydraError(f"counts.{key} must be a whole number, not {count!r}")
    for key in ("name", "fingerprint"):
        if not isinstance(manifest.tokenizer.get(key), str):
            raise HydraError(
                f"tokenizer.{key} must be a string, not {manifest.tokenizer.get(key)!r}"
            )
    if not isinstance(manifest.source.get("shard", {}), dict):
        raise HydraError("source.shard must be a mapping")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Description of a ``.bin/.idx`` pair.

    Attributes:
        source: inputs, revision, options of the preparation; free-form but JSON.
        tokenizer: ``name``, ``fingerprint``, ``vocab_size``, ``eod_id``.
        counts: ``documents``, ``sequences``, ``tokens``, ``max_token_id``, ``longest_document``,
            ``rows``, ``empty_rows``, ``bad_rows``.
        loss: ``all``, or ``answers``: sequence mode 1 marks learned spans, mode 0 context.
        bin, idx: identities of the two files.
    """

    source: dict[str, Any]
    tokenizer: dict[str, Any]
    counts: dict[str, Any]
    loss: str
    bin: FileRecord
    idx: FileRecord

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write atomically."""
        write_json_atomic(path, FORMAT.add_header(dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read a manifest.

        Raises:
            HydraError: it is missing, is not JSON, has another format or version, or lacks a key.
        """
        body = FORMAT.read(path)
        known = {f.name: body[f.name] for f in dataclasses.fields(cls) if f.name in body}
        try:
            manifest = from_dict(cls, known, str(path))
            _check_counts(manifest)
        except HydraError as error:
            raise HydraError(f"{error}; the manifest is damaged: prepare the data again") from None
        return manifest

    def check_files(self, prefix: str) -> dict[str, str]:
        """Compare sizes and probes with the files on disk; returns the probes of ``.bin`` and ``.idx``.

        Raises:
            HydraError: a file is missing or differs from the manifest.
        """
        for suffix, record in ((".bin", self.bin), (".idx", self.idx)):
            path = prefix + suffix
            if not os.path.exists(path):
                raise HydraError(f"{path} is missing, but {prefix}.json describes it")
            size = os.path.getsize(path)
            if size < record.bytes:
                raise HydraError(
                    f"{path} is truncated: {size:,} bytes, {prefix}.json says {record.bytes:,}; "
                    "copy or prepare it again"
                )
            if size != record.bytes or file_probe(path) != record.probe:
                raise HydraError(
                    f"{prefix}.json is stale: it describes another file than {path}; prepare the data "
                    "again, or delete the manifest if the files are correct"
                )
        return {".bin": self.bin.probe, ".idx": self.idx.probe}


def file_probe(path: str | os.PathLike[str]) -> str:
    """Hash of a file's size and 64 evenly spaced blocks, first and last included. Needs O(1) reads.

    A small file, whose blocks overlap, is read once, so that a start with a thousand small files is fast.
    """
    with open(path, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        last = max(0, size - _PROBE_BLOCK)
        offsets = sorted({last * i // (_PROBE_COUNT - 1) for i in range(_PROBE_COUNT)})
        if size <= _PROBE_BLOCK * _PROBE_COUNT:
            whole = stream.readall()
            for offset in offsets:
                digest.update(whole[offset : offset + _PROBE_BLOCK])
        else:
            for offset in offsets:
                digest.update(os.pread(stream.fileno(), _PROBE_BLOCK, offset))
    return digest.hexdigest()


def file_record(path: str | os.PathLike[str], sha256: str | None = None) -> FileRecord:
    """The identity of ``path``; ``sha256`` if it is already known."""
    return FileRecord(os.path.getsize(path), sha256 or sha256_of_file(path), file_probe(path))
