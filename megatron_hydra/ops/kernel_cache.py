"""The compilers' caches on this node: their folders, records of finished work, and locks.

Triton, TileLang and torch's inductor keep compiled code in their own folders. Each entry is written under
another name and renamed when it is complete (Triton 3.6: ``triton/runtime/cache.py``, TileLang 0.1.15:
``tilelang/cache/kernel_cache.py``, torch: ``codecache.write_atomic``). So other processes never read an entry
of a killed process. This module adds *records*: small files beside these entries that name finished work with
its versions, card and sources. A record is in the folder that it describes: emptying a cache also removes its
records.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import getpass
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.files import write_text_atomic

_log = logging.getLogger(__name__)

RECORDS = "megatron_hydra"
"""Folder of the records, in every cache."""

_PACKAGES = (
    "torch", "triton", "fla-core", "flash-linear-attention", "flash-qla", "tilelang", "apache-tvm-ffi",
    "flash-attn", "flash-attn-3", "transformer-engine", "megatron-core", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13", "nvidia-cuda-nvcc",
)  # fmt: skip
"""Distributions whose version may change a kernel's compiled code or results."""

_SOURCES = ("fla", "flash_qla")
"""Packages whose files are hashed like ours, because people edit them in place."""

_STEERING = ("FLA_", "TRITON_", "TILELANG_", "TL_", "TORCHINDUCTOR_", "NVTE_")
"""Variables that change which kernels run, or how they are compiled."""

_WHERE = (
    "TRITON_CACHE_DIR", "TRITON_HOME", "TILELANG_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLA_CONFIG_DIR",
    "FLA_CACHE_MODE",
)  # fmt: skip
"""Variables that only name places; the last two are set in this package (:mod:`.fla_tuning`)."""


def _is_steering(name: str) -> bool:
    return name.startswith(_STEERING) and name not in _WHERE


_given = {name: value for name, value in os.environ.items() if _is_steering(name)}
"""The steering variables at the start of this process, with the later changes by :func:`decide`.

Current values would differ: TileLang sets ``TL_CUTLASS_PATH`` and others at its import, Megatron-Core sets
``NVTE_FLASH_ATTN`` when it builds a model, and inductor sets ``TRITON_PTXAS_PATH``. With these, a process would
not find records of other processes, nor its own earlier ones.
"""


def decide(name: str, value: str) -> None:
    """Set a steering variable that the user has not set."""
    _given.setdefault(name, os.environ.setdefault(name, value))


def environment_as_given() -> dict[str, str]:
    """The environment for another process of this job, without variables that libraries have set here."""
    others = {name: value for name, value in os.environ.items() if not _is_steering(name)}
    return {**others, **_given}


def triton_folder() -> Path:
    """Triton's cache."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    return Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache"))


def keep_triton_folder() -> None:
    """Keep Triton's cache in its current folder, for this process and its children.

    torch's inductor sets ``TRITON_CACHE_DIR``, if it is unset, to a folder of its own for each device when
    it compiles its first kernel (``torch/_inductor/runtime/triton_heuristics.py``). From then on no Triton
    kernel of the process would be found by another rank, by the next job, or by our records.
    """
    os.environ.setdefault("TRITON_CACHE_DIR", str(triton_folder()))


def cache_folders() -> list[Path]:
    """The caches of the compilers that are installed here."""
    folders = [triton_folder()]
    if importlib.util.find_spec("tilelang") is not None:
        default = os.path.expanduser("~/.tilelang/cache")
        folders.append(Path(os.environ.get("TILELANG_CACHE_DIR") or default))
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not inductor:
        inductor = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    return [*folders, Path(inductor)]


def fingerprint(device: torch.device) -> dict[str, Any]:
    """Everything except arguments that decides how kernels are compiled and what they compute.

    It has versions of torch, Triton, FLA, TileLang and others, the card, its driver, the steering variables as
    the user has set them, and a hash of the sources of our kernels, FLA's and FlashQLA's.
    """
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "versions": {name: version for name, version in versions.items() if version},
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "card": card(device),
        "driver": _driver(),
        "environment": dict(sorted(_given.items())),
        "sources": _sources_hash(),
    }


def card(device: torch.device) -> str:
    """Name and compute capability of a GPU; for other devices, the type."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return ""


@functools.cache
def _sources_hash() -> str:
    folders = [Path(__file__).parent]
    for name in _SOURCES:
        spec = importlib.util.find_spec(name)
        folders += map(Path, (spec.submodule_search_locations or ()) if spec else ())
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            found.update(f"{folder.name}/{path.relative_to(folder)}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def key_of(facts: Any) -> str:
    """A short name for facts that JSON can write."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def is_recorded(key: str) -> bool:
    """Whether the work of this name is recorded in every current cache."""
    return all((folder / RECORDS / key).is_file() for folder in cache_folders())


def record(key: str, facts: dict[str, Any]) -> None:
    """Record in every cache that the work of this name is done. A failed write is not an error."""
    for folder in cache_folders():
        try:
            text = json.dumps(facts, indent=1, sort_keys=True, default=str)
            write_text_atomic(folder / RECORDS / key, text)
        except OSError as error:
            _log.warning("%s cannot record the compiled kernels (%s)", folder, error)


@contextlib.contextmanager
def alone_on_this_node(
    key: str, waiting: Callable[[float], None], poll_seconds: float = 1.0
) -> Iterator[None]:
    """Let only one process at a time do the work of this name; the lock ends with the process.

    If several nodes share the cache's disk, it is one process of all nodes.

    Args:
        key: name of the work.
        waiting: called every ``poll_seconds`` with the seconds waited, while another process has the lock.
    """
    path = triton_folder() / RECORDS / f"{key}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115
    except OSError as error:
        _log.warning("%s cannot be written (%s): every process compiles for itself", path, error)
        yield
        return
    with file:
        started = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting(time.monotonic() - started)
                time.sleep(poll_seconds)
            except OSError as error:  # some network file systems have no locks
                _log.warning(
                    "%s cannot be locked (%s): every process compiles for itself", path, error
                )
                break
        yield
