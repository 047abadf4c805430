"""Hashes of the inputs of steps: JSON, files, model folders, the package itself."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hydra.data.manifest import Manifest
from megatron_hydra.errors import HydraError
from megatron_hydra.files import sha256_of_file

_DIGITS = 32


def of_json(body: Mapping[str, Any]) -> str:
    """Hash of plain data, for any order of keys; 64 hexadecimal digits."""
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 of a file's content, its first 32 hexadecimal digits.

    A process reads a file once for all cells, unless its size or its time changes.

    Raises:
        HydraError: the file cannot be read.
    """
    try:
        facts = path.stat()
        return _digest(path.resolve(), facts.st_size, facts.st_mtime_ns)
    except OSError as error:
        raise HydraError(f"{path} cannot be read: {error}") from None


@functools.cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_of_file(path)[:_DIGITS]


def of_folder(folder: Path) -> str:
    """Hash of all files in a folder and its subfolders, except Python's caches.

    Raises:
        HydraError: it is not a folder, or a file cannot be read.
    """
    if not folder.is_dir():
        raise HydraError(f"{folder} is not a folder")
    found = (path for path in folder.rglob("*") if path.is_file())
    files = sorted(path for path in found if "__pycache__" not in path.parts)
    return of_json({str(path.relative_to(folder)): of_file(path) for path in files})[:_DIGITS]


def of_model(folder: Path) -> str:
    """Hash of a Hugging Face folder: config, weights and tokenizer."""
    names = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".py", ".model")
    )
    return of_json({name: of_file(folder / name) for name in names})[:_DIGITS]


def of_data(prefix: str) -> dict[str, str]:
    """Hashes of an indexed data set's two files, from its manifest or by reading them.

    Raises:
        HydraError: a file is missing, or does not match the manifest.
    """
    files = {"index": Path(f"{prefix}.idx"), "tokens": Path(f"{prefix}.bin")}
    for path in files.values():
        if not path.is_file():
            raise HydraError(f"data {path} does not exist")
    if not Path(f"{prefix}.json").is_file():
        return {name: of_file(path) for name, path in files.items()}
    manifest = Manifest.load(f"{prefix}.json")
    manifest.check_files(prefix)
    return {"index": manifest.idx.sha256[:_DIGITS], "tokens": manifest.bin.sha256[:_DIGITS]}


@functools.cache
def of_package() -> str:
    """Hash of the package's own Python. Every result has it, which shows results of mixed versions."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]
