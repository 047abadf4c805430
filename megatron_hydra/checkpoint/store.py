"""The checkpoint folder: a model's config, weights as ``dist_checkpointing`` files, a manifest.

::

    <folder>/model.json      the ModelConfig
    <folder>/weights/        dist_checkpointing files; keys and shapes are the canonical ones
    <folder>/tokenizer/      tokenizer files, where known
    <folder>/manifest.json   SHA-256 of every file, and where the checkpoint comes from

Nothing here depends on a parallel layout: tensors are stored whole, cut into one piece a head, so
that a run under any layout reads just the heads it needs. Everything works in a single process
without a launcher or a GPU.

What is checked before anything is opened is in :mod:`megatron_hydra.checkpoint.integrity`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_hydra.checkpoint import canonical
from megatron_hydra.checkpoint.atomic import atomic_folder, write_text_atomic
from megatron_hydra.checkpoint.hf_config import read_json
from megatron_hydra.checkpoint.integrity import (
    MANIFEST_FILE,
    WEIGHTS,
    read_index,
    read_manifest,
    sha256_of_file,
    verify_checkpoint,
    verify_manifest,
    write_manifest,
)
from megatron_hydra.config.loading import from_dict, to_dict
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.errors import HydraError

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

__all__ = [
    "MANIFEST_FILE",
    "WEIGHTS",
    "load_canonical",
    "read_index",
    "read_manifest",
    "save_canonical",
    "sha256_of_file",
    "verify_checkpoint",
    "verify_manifest",
    "write_manifest",
]

MODEL_FORMAT, MODEL_VERSION = "megatron-hydra-model", 1
MODEL_FILE, LATEST_FILE = "model.json", "latest"
TOKENIZER = "tokenizer"

NON_MODEL_KEYS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", "training.")
"""Prefixes of what a training checkpoint holds besides the model."""

PIECE_BYTES = 16 * 2**20
"""Tensors without a head axis are stored in pieces of about this size, so that a rank reads little
more than its part."""

_SMALLEST_HEAD_BYTES = 16 * 2**10


# -- folders -------------------------------------------------------------------------------------


def resolve_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint folder that ``path`` means: itself, or the latest of a run's ``checkpoints``.

    Raises:
        HydraError: no such folder, or neither of the two.
    """
    path = Path(path)
    if not path.is_dir():
        raise HydraError(f"checkpoint {path} does not exist")
    if (path / MODEL_FILE).is_file():
        return path
    latest = path / LATEST_FILE
    if not latest.is_file():
        raise HydraError(
            f"{path} is no checkpoint: it holds neither {MODEL_FILE} nor {LATEST_FILE}; make one "
            "with tools/hf_to_megatron.py"
        )
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not name or os.path.basename(name) != name or not (path / name / MODEL_FILE).is_file():
        raise HydraError(f"{latest} names {name!r}, which is no checkpoint in {path}")
    return path / name


def write_model_config(folder: str | os.PathLike[str], model: ModelConfig) -> None:
    """Write ``model.json``."""
    body = {"format": MODEL_FORMAT, "version": MODEL_VERSION, **to_dict(model)}
    write_text_atomic(Path(folder) / MODEL_FILE, json.dumps(body, indent=1) + "\n")


def read_model_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The :class:`ModelConfig` of a checkpoint (a folder, or a run's ``checkpoints``).

    Raises:
        HydraError: no checkpoint, another format or version, or an invalid key.
    """
    path = resolve_checkpoint(folder) / MODEL_FILE
    body = read_json(path)
    if body.pop("format", None) != MODEL_FORMAT:
        raise HydraError(f"{path}: key 'format' is not {MODEL_FORMAT!r}")
    version = body.pop("version", None)
    if version != MODEL_VERSION:
        raise HydraError(f"{path}: version {version!r} is not supported (this is {MODEL_VERSION})")
    return from_dict(ModelConfig, body, str(path))


def tokenizer_folder(folder: str | os.PathLike[str]) -> Path | None:
    """The tokenizer files of a checkpoint, or ``None`` if it has none."""
    path = resolve_checkpoint(folder) / TOKENIZER
    return path if path.is_dir() and any(path.iterdir()) else None


# -- one process ---------------------------------------------------------------------------------


def _prepare_megatron() -> None:
    """The platform comes before any megatron import; both cost seconds, so only where needed."""
    from megatron_hydra.parallel import platform

    platform.install()


@contextlib.contextmanager
def single_process_group() -> Iterator[None]:
    """Make ``torch.distributed`` usable in a process without a launcher, for the block's duration.

    Does nothing where a process group exists already.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    hook = sys.excepthook  # torch's is one that labels every line with the rank, and stays
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


@contextlib.contextmanager
def plain_failures(weights: Path) -> Iterator[None]:
    """Raise what went wrong, and not torch's report of what went wrong on which rank."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as report:
        error = next(iter(report.failures.values()))[0]
        if isinstance(error, HydraError):
            raise error from None
        raise HydraError(f"{weights}: {type(error).__name__}: {error}") from report


# -- saving --------------------------------------------------------------------------------------


def pieces_of(key: str, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Into how many equal pieces along axis 0 a tensor is stored.

    Attention tensors: one a head (unless heads are tiny), so that a rank reads its own heads only.
    Others: pieces of about :data:`PIECE_BYTES`.
    """
    if len(shape) < 2:
        return 1
    total = torch.Size(shape).numel() * dtype.itemsize
    if ".self_attention." in key:
        return shape[0] if total // shape[0] >= _SMALLEST_HEAD_BYTES else 1
    wanted = min(shape[0], -(-total // PIECE_BYTES))
    return next(count for count in range(wanted, shape[0] + 1) if shape[0] % count == 0)


def _sharded(tensors: Mapping[str, torch.Tensor], model: ModelConfig) -> dict[str, ShardedTensor]:
    """Descriptions of all pieces; their data are meta tensors, so nothing is made yet."""
    from megatron.core.dist_checkpointing import ShardedTensor

    entries = {}
    for key in canonical.canonical_shapes(model):
        spec = canonical.describe(tensors, key)
        count = pieces_of(key, spec.shape, spec.dtype)
        piece = (spec.shape[0] // count, *spec.shape[1:])
        for index in range(count):
            data = torch.empty(piece, dtype=spec.dtype, device="meta")
            name = key if count == 1 else f"{key}#{index}"
            entries[name] = ShardedTensor.from_rank_offsets(key, data, (0, index, count))
    return entries


class _Pieces:
    """Cuts tensors on demand; keeps the last one, as pieces of a tensor are asked for in a row."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], bar: Any) -> None:
        self._tensors = tensors
        self._bar = bar
        self._key = ""
        self._tensor = torch.empty(0)

    def __call__(self, key: str, offset: int, rows: int) -> torch.Tensor:
        if key != self._key:
            self._key = ""
            self._tensor = torch.empty(0)  # lets go of the last tensor before making the next
            self._tensor = self._tensors[key].detach().to("cpu").contiguous()
            self._key = key
        piece = self._tensor[offset : offset + rows]
        self._bar.update(piece.nbytes)
        return piece


def _streaming_strategy(pieces: _Pieces) -> Any:
    """A ``torch_dist`` save strategy that makes one tensor at a time.

    Megatron's own strategy holds all tensors at once and forks writers; the files are the same.
    """
    from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )
    from torch.distributed import checkpoint as dcp

    class Planner(MCoreSavePlanner):
        def resolve_data(self, write_item: Any) -> torch.Tensor:
            chunk = write_item.tensor_data.chunk
            return pieces(write_item.index.fqn, chunk.offsets[0], chunk.sizes[0])

    class Strategy(SaveShardedStrategy):
        can_handle_sharded_objects = True

        def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
            flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
            dcp.save(
                mcore_to_pyt_state_dict(flat, False),
                storage_writer=dcp.FileSystemWriter(checkpoint_dir),
                planner=Planner(dedup_replicated_tensors=False, flatten_state_dict=False),
            )

    return Strategy("torch_dist", 1)


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
    """Write a checkpoint folder, whole or not at all. Call it in a single process.

    Args:
        folder: the folder to make.
        tensors: the canonical state dict; with :class:`~.canonical.LazyTensors`, one tensor is in
            memory at a time.
        model: its config.
        tokenizer_dir: where to copy tokenizer files from.
        extra_manifest: JSON-able provenance for the manifest.
        force: replace an existing folder.
        progress: show a bar on stderr.
        check: called with the complete folder before it takes its name; may refuse by raising.

    Raises:
        HydraError: the folder exists, or a key is missing, extra or misshapen.
    """
    from megatron_hydra.checkpoint.hf_io import copy_tokenizer_files

    shapes = {key: canonical.describe(tensors, key).shape for key in tensors}
    canonical.check_shapes(shapes, model, "state dict")
    with atomic_folder(folder, force=force) as temporary:
        write_model_config(temporary, model)
        if tokenizer_dir is not None:
            copy_tokenizer_files(tokenizer_dir, temporary / TOKENIZER)
        _save_weights(temporary / WEIGHTS, tensors, model, progress)
        write_manifest(temporary, extra_manifest)
        if check is not None:
            check(temporary)


def _save_weights(
    weights: Path, tensors: Mapping[str, torch.Tensor], model: ModelConfig, progress: bool
) -> None:
    from tqdm import tqdm

    _prepare_megatron()
    from megatron.core import dist_checkpointing

    weights.mkdir()
    sharded = _sharded(tensors, model)
    total = sum(torch.Size(s.local_shape).numel() * s.dtype.itemsize for s in sharded.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not progress)
    with single_process_group(), bar, plain_failures(weights):
        strategy = _streaming_strategy(_Pieces(tensors, bar))
        dist_checkpointing.save(sharded, str(weights), sharded_strategy=strategy)


# -- loading -------------------------------------------------------------------------------------


def stored_tensors(
    folder: str | os.PathLike[str],
) -> dict[str, tuple[canonical.Shape, torch.dtype]]:
    """Key -> (shape, dtype) of the model's tensors in a checkpoint, from its index.

    Raises:
        HydraError: an index that cannot be trusted, or a key that is missing, extra or misshapen.
    """
    folder = resolve_checkpoint(folder)
    model = read_model_config(folder)
    weights = folder / WEIGHTS
    entries: dict[str, Any] = read_index(weights).state_dict_metadata  # tensors, it has checked
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
        keys: which; ``None`` for all of the model's.
        verify: check the folder first (reads every file once more). Pass ``False`` only after
            :func:`verify_checkpoint`.

    Raises:
        HydraError: a damaged or foreign checkpoint, or a key it lacks.
    """
    _prepare_megatron()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    folder = resolve_checkpoint(folder)
    if verify:
        verify_checkpoint(folder)
    stored = stored_tensors(folder)
    wanted = list(stored) if keys is None else list(keys)
    for key in wanted:
        if key not in stored:
            raise HydraError(f"{folder}: the checkpoint has no tensor {key!r}")
    targets = {
        key: ShardedTensor.from_rank_offsets(key, torch.empty(stored[key][0], dtype=stored[key][1]))
        for key in wanted
    }
    with single_process_group(), plain_failures(folder / WEIGHTS):
        # Every process loads everything it asks for, so shards overlap where there are several.
        loaded = dist_checkpointing.load(
            targets, str(folder / WEIGHTS), validate_access_integrity=False
        )
    return {key: loaded[key] for key in wanted}


def lazy_canonical(folder: str | os.PathLike[str]) -> canonical.LazyTensors:
    """The model's tensors of a checkpoint, each read when asked for. Verify the checkpoint first."""
    folder = resolve_checkpoint(folder)

    def load(key: str) -> torch.Tensor:
        return load_canonical(folder, [key], verify=False)[key]

    return canonical.LazyTensors(
        {
            key: canonical.LazyTensor(shape, dtype, functools.partial(load, key))
            for key, (shape, dtype) in stored_tensors(folder).items()
        }
    )
