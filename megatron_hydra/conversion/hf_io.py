"""Read and write Hugging Face folders: safetensors, lazy reads, sharded writes, all keys checked.

Pickled weights (``.bin``) are never opened.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_hydra.checkpoint.canonical import (
    LazyTensor,
    LazyTensors,
    Shape,
    is_fp32,
    refuse_differences,
)
from megatron_hydra.checkpoint.tokenizer_files import tokenizer_files
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.conversion import families
from megatron_hydra.errors import HydraError
from megatron_hydra.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DEFAULT_SHARD_BYTES = 5 * 10**9

# Names of safetensors dtypes in a file's header.
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``, as in ``config.json``."""
    return str(dtype).removeprefix("torch.")


def left_out(folder: str | os.PathLike[str], known: Sequence[str]) -> list[str]:
    """The files and folders of a model folder that no conversion copies, sorted; a folder's name ends in a
    slash.

    Args:
        folder: of a model or of a tokenizer.
        known: names, and patterns of names, that are read or made again.

    Hidden files and files of converted weights are not listed.
    """
    folder = Path(folder)
    carried = set(tokenizer_files(folder))
    known = (*known, "config.json", INDEX, "*.safetensors")
    names = []
    for path in folder.iterdir():
        if path.name.startswith((".", "__pycache__")) or path.name in carried:
            continue
        if path.is_dir():
            inside = {p.relative_to(folder).as_posix() for p in path.rglob("*") if p.is_file()}
            rest = sorted(inside - carried)
            names += [f"{path.name}/"] if len(rest) == len(inside) else rest
        elif not any(fnmatch.fnmatch(path.name, pattern) for pattern in known):
            names.append(path.name)
    return sorted(names)


# -- reading -------------------------------------------------------------------------------------


class HfWeights(Mapping[str, torch.Tensor]):
    """The tensors of a Hugging Face folder by name; each is read from its file on request.

    Reading maps the file: a tensor needs no memory after it is dropped.

    Raises:
        HydraError: no safetensors, only pickles, a missing or broken shard, or an index that does not match the
            shards; names the file.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._handles = {name: _open(self.folder / name) for name in self._shard_names()}
        self._file_of: dict[str, str] = {}
        for file_name, handle in self._handles.items():
            for key in handle.keys():  # noqa: SIM118  (the handle is not a mapping)
                if key in self._file_of:
                    raise HydraError(
                        f"{self.folder / file_name}: tensor {key!r} is also in {self._file_of[key]}"
                    )
                self._file_of[key] = file_name
        self._check_index()

    def _shard_names(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            self._index = _read_index(self.folder / INDEX)
            return sorted(set(self._index.values()))
        self._index = {}
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        pickles = sorted(self.folder.glob("*.bin"))
        if pickles:
            raise HydraError(
                f"{pickles[0]}: pickled weights are not opened (they can run code); save the model "
                "as safetensors: model.save_pretrained(folder, safe_serialization=True)"
            )
        raise HydraError(f"{self.folder} holds neither {SINGLE} nor {INDEX}")

    def _check_index(self) -> None:
        for key, file_name in self._index.items():
            if self._file_of.get(key) != file_name:
                raise HydraError(
                    f"{self.folder / INDEX}: tensor {key!r} is not in {file_name} as the index says"
                )
        for key, file_name in self._file_of.items():
            if self._index and key not in self._index:
                raise HydraError(f"{self.folder / file_name}: tensor {key!r} is not in the index")

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._handles[self._file_of[key]].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def file_of(self, key: str) -> Path:
        """The file with ``key``; the folder if no file has it."""
        return self.folder / self._file_of.get(key, "")

    def shape(self, key: str) -> Shape:
        """Shape of ``key``, from the file's header."""
        return tuple(self._handles[self._file_of[key]].get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of ``key``, from the file's header.

        Raises:
            HydraError: an integer or 8-bit float, because quantised weights are not converted.
        """
        name = self._handles[self._file_of[key]].get_slice(key).get_dtype()
        if name not in _SAFETENSORS_DTYPES:
            raise HydraError(f"{self.file_of(key)}: tensor {key!r} has dtype {name}: not supported")
        return _SAFETENSORS_DTYPES[name]


def _open(path: Path) -> Any:
    try:
        # The handle stays open as long as tensors may be requested.
        return safe_open(path, framework="pt", device="cpu").__enter__()
    except (OSError, SafetensorError) as error:
        raise HydraError(f"{path} cannot be read as safetensors: {error}") from None


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HydraError(f"{path}: key 'weight_map' is missing or empty")
    for name in weight_map.values():
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise HydraError(f"{path}: {name!r} is not the name of a file in this folder")
    return weight_map


def hf_to_canonical(
    weights: HfWeights, model: ModelConfig, dtype: torch.dtype | None = None
) -> LazyTensors:
    """The canonical state dict of a Hugging Face folder.

    Args:
        weights: the folder's tensors.
        model: its config, from :func:`~megatron_hydra.conversion.hf_config.read_hf_config`.
        dtype: convert to it (all except fp32 parameters); ``None`` keeps the file's dtype.

    Returns:
        Lazy tensors: each is read and rearranged on request.

    Raises:
        HydraError: a missing, extra or misshapen tensor, or a tied model with its own LM head.
    """
    mappings = families.name_map(model)
    _account_for_all(weights, model, mappings)
    tensors = {}
    for mapping in mappings:
        stored = {weights.dtype(name) for name in mapping.hf}
        if len(stored) > 1:
            first = next(iter(mapping.hf))
            raise HydraError(
                f"{weights.file_of(first)}: {' and '.join(mapping.hf)} have different dtypes"
            )
        (own,) = stored
        target = own if dtype is None or is_fp32(mapping.canonical) else dtype
        tensors[mapping.canonical] = LazyTensor(
            mapping.canonical_shape, target, _reader(weights, mapping, target)
        )
    return LazyTensors(tensors)


def _reader(
    weights: HfWeights, mapping: families.Mapping, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        parts = [weights[name] for name in mapping.hf]
        return mapping.form.to_canonical(parts, mapping.canonical_shape).to(dtype)

    return read


def _account_for_all(
    weights: HfWeights, model: ModelConfig, mappings: Sequence[families.Mapping]
) -> None:
    expected = {name: shape for mapping in mappings for name, shape in mapping.hf.items()}
    harmless = re.compile("|".join(f"(?:{pattern})" for pattern in families.HARMLESS_EXTRAS))
    found = {
        key: weights.shape(key) for key in weights if key in expected or not harmless.fullmatch(key)
    }
    if model.tie_embeddings and "lm_head.weight" in found:
        _check_tied_head(weights)
        del found["lm_head.weight"]
    refuse_differences(expected, found, lambda key: str(weights.file_of(key)))


def _check_tied_head(weights: HfWeights) -> None:
    """Check the LM head of a tied model: if it is stored, it must equal the embedding."""
    head, embedding = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    if not torch.equal(head, embedding):
        raise HydraError(
            f"{weights.file_of('lm_head.weight')}: lm_head.weight differs from "
            "model.embed_tokens.weight, but config.json ties them; set tie_word_embeddings to "
            "false to keep both, or remove lm_head.weight"
        )


# -- writing -------------------------------------------------------------------------------------


def plan_shards(
    model: ModelConfig,
    dtype_of: Callable[[str], torch.dtype],
    max_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[list[families.Mapping]]:
    """Split a model over files of at most ``max_bytes``, canonical tensors in order.

    A canonical tensor is never split, so a larger one has its own file.
    """
    shards: list[list[families.Mapping]] = [[]]
    filled = 0
    for mapping in families.name_map(model):
        size = num_bytes(mapping, dtype_of(mapping.canonical))
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(mapping)
        filled += size
    return shards


def num_bytes(mapping: families.Mapping, dtype: torch.dtype) -> int:
    """Size of one canonical tensor, and of the HF tensors that it becomes."""
    return torch.Size(mapping.canonical_shape).numel() * dtype.itemsize


def write_hf_weights(
    folder: str | os.PathLike[str],
    shards: Sequence[Sequence[families.Mapping]],
    load: Callable[[list[str]], Mapping[str, torch.Tensor]],
    on_shard: Callable[[int], Any] = lambda size: None,
) -> None:
    """Write safetensors: one file, or several with an index. One shard is in memory at a time.

    Args:
        folder: an existing folder.
        shards: from :func:`plan_shards`.
        load: canonical keys -> their tensors; called once for each shard.
        on_shard: called with the bytes of every shard that is written, for a progress bar.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = (
            SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = _shard_tensors(shard, load)
        save_file(tensors, Path(folder) / name, metadata={"format": "pt"})
        size = sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, name)
        total += size
        on_shard(size)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (Path(folder) / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shard_tensors(
    shard: Sequence[families.Mapping], load: Callable[[list[str]], Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    canonical = load([mapping.canonical for mapping in shard])
    tensors = {}
    for mapping in shard:
        parts = mapping.form.to_hf(canonical[mapping.canonical])
        for (name, shape), part in zip(mapping.hf.items(), parts, strict=True):
            assert tuple(part.shape) == shape, (name, tuple(part.shape), shape)
            tensors[name] = part
    return tensors
