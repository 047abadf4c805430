"""Hashes of what steps read: JSON, files, model folders, the package itself."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megatron_hydra
from megatron_hydra.errors import HydraError

_WHOLE = 64 * 2**20
_END = 2**20


def of_json(body: Mapping[str, Any]) -> str:
    """Hash of plain data, the same for any order of keys; 64 hexadecimal digits."""
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def of_file(path: Path) -> str:
    """Hash of a file's content; of size, start and end for files above 64 MiB.

    Raises:
        HydraError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if size <= _WHOLE:
                digest.update(file.read())
            else:
                digest.update(str(size).encode() + file.read(_END))
                file.seek(-_END, 2)
                digest.update(file.read())
    except OSError as error:
        raise HydraError(f"{path} cannot be read: {error}") from None
    return digest.hexdigest()[:32]


@functools.cache
def of_model(folder: Path) -> str:
    """Hash of a Hugging Face folder: config, weights and tokenizer."""
    names = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".py", ".model")
    )
    return of_json({name: of_file(folder / name) for name in names})[:32]


@functools.cache
def of_package() -> str:
    """Hash of the package's own Python: kept with every result, so that mixtures show."""
    root = Path(megatron_hydra.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]
