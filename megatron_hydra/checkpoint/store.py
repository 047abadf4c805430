"""The checkpoint folder: a model's config, weights as ``dist_checkpointing`` files, a manifest.

::

    <folder>/model.json      the ModelConfig
    <folder>/weights/        dist_checkpointing files; keys and shapes are the canonical ones
    <folder>/tokenizer/      tokenizer files, if known
    <folder>/manifest.json   SHA-256 of every file, and the origin of the checkpoint

The format does not depend on a parallel layout. Whole tensors are stored in records of a few heads each, so
a run under any layout reads little more than the heads that it needs. All functions work in a single
process without a launcher or a GPU. :mod:`megatron_hydra.checkpoint.records` reads and writes the files.

:mod:`megatron_hydra.checkpoint.integrity` checks the files before they are opened.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_hydra.checkpoint import canonical, records
from megatron_hydra.checkpoint.integrity import (
    MANIFEST_FILE,
    WEIGHTS,
    read_index,
    read_manifest,
    verify_checkpoint,
    verify_manifest,
    write_manifest,
)
from megatron_hydra.checkpoint.tokenizer_files import copy_tokenizer_files
from megatron_hydra.config.loading import from_dict, to_dict
from megatron_hydra.config.model import ModelConfig, stored_switches
from megatron_hydra.errors import HydraError
from megatron_hydra.files import JsonFormat, atomic_folder, write_json_atomic

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

__all__ = [
    "MANIFEST_FILE",
    "WEIGHTS",
    "load_canonical",
    "read_index",
    "read_manifest",
    "save_canonical",
    "verify_checkpoint",
    "verify_manifest",
    "write_manifest",
]

MODEL = JsonFormat("megatron-hydra-model", 1, "checkpoint's model")
MODEL_FILE, LATEST_FILE = "model.json", "latest"
TOKENIZER = "tokenizer"
_WEIGHTS_FILE = "__0_0.distcp"

NON_MODEL_KEYS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", "training.")
"""Prefixes of the keys in a training checkpoint that are not the model's."""

# -- folders -------------------------------------------------------------------------------------


def resolve_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Resolve ``path`` to a checkpoint folder: ``path`` itself, or the latest of a run's ``checkpoints``.

    Raises:
        HydraError: the folder does not exist, or is neither of the two.
    """
    path = Path(path)
    if not path.is_dir():
        raise HydraError(f"checkpoint {path} does not exist")
    if (path / MODEL_FILE).is_file():
        return path
    latest = path / LATEST_FILE
    if not latest.is_file():
        raise HydraError(
            f"{path} is not a checkpoint: it holds neither {MODEL_FILE} nor {LATEST_FILE}; make one "
            "with tools/hf_to_megatron.py"
        )
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not name or os.path.basename(name) != name or not (path / name / MODEL_FILE).is_file():
        raise HydraError(f"{latest} names {name!r}, which is not a checkpoint in {path}")
    return path / name


def write_model_config(folder: str | os.PathLike[str], model: ModelConfig) -> None:
    """Write ``model.json``."""
    write_json_atomic(Path(folder) / MODEL_FILE, MODEL.add_header(to_dict(model)))


def read_model_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The :class:`ModelConfig` of a checkpoint (a folder, or a run's ``checkpoints``).

    Raises:
        HydraError: the folder is not a checkpoint, has another format or version, or has an invalid key.
    """
    path = resolve_checkpoint(folder) / MODEL_FILE
    body = MODEL.read(path)
    if isinstance(body.get("hydra"), dict):
        body["hydra"] = stored_switches(body["hydra"])
    return from_dict(ModelConfig, body, str(path))


def tokenizer_folder(folder: str | os.PathLike[str]) -> Path | None:
    """The tokenizer files of a checkpoint, or ``None`` if it has none."""
    path = resolve_checkpoint(folder) / TOKENIZER
    return path if path.is_dir() and any(path.iterdir()) else None


# -- saving --------------------------------------------------------------------------------------


def save_canonical(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    model: ModelConfig,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    extra_manifest: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    progress: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint folder atomically. Call it in a single process.

    Args:
        folder: the folder to create.
        tensors: the canonical state dict; with :class:`~.canonical.LazyTensors`, one tensor is in
            memory at a time.
        model: its config.
        tokenizer_dir: the folder to copy tokenizer files from.
        extra_manifest: JSON-able provenance for the manifest.
        force: replace an existing folder.
        progress: show a bar on stderr.
        check: called with the complete folder before the rename to its final name. It raises to reject it.

    Raises:
        HydraError: the folder exists, a key is missing or extra, or a shape is wrong.
    """
    shapes = {key: canonical.describe(tensors, key).shape for key in tensors}
    canonical.check_shapes(shapes, model, "state dict")
    with atomic_folder(folder, force=force) as temporary:
        write_model_config(temporary, model)
        if tokenizer_dir is not None:
            copy_tokenizer_files(tokenizer_dir, temporary / TOKENIZER)
        hashes = _save_weights(temporary / WEIGHTS, tensors, model, progress)
        write_manifest(temporary, extra_manifest, hashes)
        if check is not None:
            check(temporary)


def _save_weights(
    weights: Path, tensors: Mapping[str, torch.Tensor], model: ModelConfig, progress: bool
) -> dict[str, str]:
    """Write everything below ``weights``. Return file name -> hash of the file of records."""
    from tqdm import tqdm

    weights.mkdir()
    boxes = []
    for key in canonical.canonical_shapes(model):
        spec = canonical.describe(tensors, key)
        start = (0,) * len(spec.shape)
        boxes += records.records_of(records.Box(key, start, spec.shape, spec.shape, spec.dtype))
    total = sum(box.num_bytes for box in boxes)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not progress) as bar:
        cut = _cut_on_demand(boxes, tensors, bar)
        places, digest = records.write_file(weights / _WEIGHTS_FILE, cut)
    by_box = dict(zip(boxes, places, strict=True))
    records.write_index(weights, records.check_cover(boxes), by_box)
    records.write_common(weights, {})
    return {f"{WEIGHTS}/{_WEIGHTS_FILE}": digest}


def _cut_on_demand(
    boxes: Sequence[records.Box], tensors: Mapping[str, torch.Tensor], bar: Any
) -> Iterator[torch.Tensor]:
    """Yield the data of boxes. Boxes of one tensor follow each other, so only one tensor is in memory."""
    for key, parts in itertools.groupby(boxes, lambda box: box.key):
        tensor = tensors[key].detach().to("cpu").contiguous()
        for box in parts:
            yield tensor[box.offset[0] : box.offset[0] + box.shape[0]]
            bar.update(box.num_bytes)
        del tensor  # free it before the next one is made


# -- loading -------------------------------------------------------------------------------------


def stored_tensors(
    folder: str | os.PathLike[str],
) -> dict[str, tuple[canonical.Shape, torch.dtype]]:
    """Key -> (shape, dtype) of the model's tensors in a checkpoint, from its index.

    Raises:
        HydraError: the index is not safe to open, a key is missing or extra, or a shape is wrong.
    """
    folder = resolve_checkpoint(folder)
    return _described(folder, read_index(folder / WEIGHTS))


def _described(folder: Path, index: Metadata) -> dict[str, tuple[canonical.Shape, torch.dtype]]:
    model, weights = read_model_config(folder), folder / WEIGHTS
    entries: dict[str, Any] = index.state_dict_metadata  # read_index accepts only tensors
    found = {
        key: (tuple(entry.size), entry.properties.dtype)
        for key, entry in entries.items()
        if not key.startswith(NON_MODEL_KEYS)
    }
    canonical.check_shapes({key: shape for key, (shape, _) in found.items()}, model, str(weights))
    return found


def load_canonical(
    folder: str | os.PathLike[str],
    keys: Sequence[str] | None = None,
    *,
    verify: bool = True,
) -> dict[str, torch.Tensor]:
    """Read canonical tensors, in the dtypes they are stored in.

    Args:
        folder: a checkpoint, or a run's ``checkpoints``.
        keys: keys to read; ``None``: all keys of the model.
        verify: check the folder first (reads every file twice). Pass ``False`` only after
            :func:`verify_checkpoint`.

    Raises:
        HydraError: the checkpoint is damaged or not ours, or a key is missing.
    """
    folder = resolve_checkpoint(folder)
    if verify:
        verify_checkpoint(folder)
    index = read_index(folder / WEIGHTS)
    stored = _described(folder, index)
    wanted = list(stored) if keys is None else list(keys)
    for key in wanted:
        if key not in stored:
            raise HydraError(f"{folder}: the checkpoint has no tensor {key!r}")
    return _read_whole(folder, {key: stored[key] for key in wanted}, index)


def _read_whole(
    folder: Path, tensors: Mapping[str, tuple[canonical.Shape, torch.dtype]], index: Metadata
) -> dict[str, torch.Tensor]:
    targets = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in tensors.items()}
    boxes = [
        records.Box(key, (0,) * len(shape), shape, shape, dtype)
        for key, (shape, dtype) in tensors.items()
    ]
    wanted = list(zip(boxes, targets.values(), strict=True))
    records.read_boxes(folder / WEIGHTS, wanted, index)
    return targets


def lazy_canonical(folder: str | os.PathLike[str]) -> canonical.LazyTensors:
    """The model's tensors of a checkpoint, each read on access. Verify the checkpoint first."""
    folder = resolve_checkpoint(folder)
    index = read_index(folder / WEIGHTS)
    stored = _described(folder, index)

    def load(key: str) -> torch.Tensor:
        return _read_whole(folder, {key: stored[key]}, index)[key]

    return canonical.LazyTensors(
        {
            key: canonical.LazyTensor(shape, dtype, functools.partial(load, key))
            for key, (shape, dtype) in stored.items()
        }
    )
