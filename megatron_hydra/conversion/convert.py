"""The two conversions: a Hugging Face folder to a Megatron checkpoint, and back."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.checkpoint import store
from megatron_hydra.checkpoint.canonical import LazyTensors, is_fp32
from megatron_hydra.checkpoint.tokenizer_files import copy_tokenizer_files
from megatron_hydra.config.loading import to_dict
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.config.student import StudentStart
from megatron_hydra.conversion import parity
from megatron_hydra.conversion.calibration import calibration_batches
from megatron_hydra.conversion.hf_config import (
    HEAD_MAP_FILE,
    hf_config_from_model,
    read_hf_config,
)
from megatron_hydra.conversion.hf_io import (
    DEFAULT_SHARD_BYTES,
    HfWeights,
    dtype_name,
    hf_to_canonical,
    left_out,
    num_bytes,
    plan_shards,
    write_hf_weights,
)
from megatron_hydra.conversion.student import StudentInit, calibrate_gamma, initialise_student
from megatron_hydra.conversion.teacher_statistics import HeadStatistics, measure_heads
from megatron_hydra.errors import HydraError
from megatron_hydra.files import atomic_folder
from megatron_hydra.head_map import HeadMap
from megatron_hydra.hf_loading import find_tokenizer, load_hf_model
from megatron_hydra.version import __version__


@dataclasses.dataclass(frozen=True)
class StudentOptions(StudentStart):
    """Options for making the student from the dense model.

    :class:`~megatron_hydra.config.student.StudentStart` has those of its initial values.

    Attributes:
        head_map: the map's file; ``None`` if every head is both FA and GDN (``hydra.mixer``).
        hydra: the layer's switches.
        seed: order of the decays over heads.
    """

    head_map: str | os.PathLike[str] | None = None
    hydra: HydraConfig = dataclasses.field(default_factory=HydraConfig)
    seed: int = 0

    @property
    def initial_values(self) -> StudentInit:
        """Start values of parameters without a dense counterpart."""
        return StudentInit(*self.half_life, kind=self.init)


# -- Hugging Face -> Megatron --------------------------------------------------------------------


def hf_to_megatron(
    hf_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    student: StudentOptions | None = None,
    *,
    revision: str = "",
    dtype: torch.dtype | None = None,
    verify: bool = False,
    force: bool = False,
    progress: bool = False,
) -> ModelConfig:
    """Convert a Hugging Face model to a Megatron checkpoint: the dense model, or a student made from it.

    Args:
        hf_path: a folder, or a Hub name.
        output: the checkpoint folder; it is written atomically.
        student: options for making a HydraHead from the dense model; ``None`` converts the model unchanged
            (also an exported HydraHead).
        revision: Hub revision.
        dtype: of the weights; ``None`` keeps the file's dtype.
        verify: whether to read the folder before it gets its name and to compare every tensor. For a small
            model with its own dtype that is not a new student, fp32 logits are compared with transformers',
            too.
        force: replace an existing ``output``.
        progress: show bars on stderr.

    Returns:
        The config of the written model.

    Raises:
        HydraError: the input cannot be converted exactly; nothing is written.
    """
    from megatron_hydra.hf_identity import resolve_hf_folder

    check_output_is_free(output, force)
    folder = resolve_hf_folder(hf_path, revision)
    model = read_hf_config(folder)
    weights = HfWeights(folder)
    tensors = hf_to_canonical(weights, model, dtype)
    model = dataclasses.replace(model, source=_source(model, weights, str(hf_path), revision))
    made: dict[str, Any] = {}
    if student is not None:
        model, tensors, made = _make_student(folder, model, tensors, student, dtype)
    provenance = {
        "stage": "hf_to_megatron",
        "package_version": __version__,
        "source": model.source,
        "dtype": "as in the source" if dtype is None else dtype_name(dtype),
        **made,
    }
    compare_logits = student is None and dtype is None

    def check(written: Path) -> None:
        if verify:
            _report(parity.verify_stored(written, tensors), "the source's")
            _verify_logits(written, folder, compare_logits)

    store.save_canonical(
        output, tensors, model, folder, provenance, force=force, progress=progress, check=check
    )
    _log_skipped_files(folder)
    return model


def _log_skipped_files(folder: Path) -> None:
    """Log the files of a folder that are not converted: all except weights, config and tokenizer."""
    from megatron_hydra.hf.export_files import hf_export_files

    names = left_out(folder, (HEAD_MAP_FILE, *hf_export_files()))
    if names:
        print(
            f"{folder}: not carried over: {', '.join(names)}; copy what is needed", file=sys.stderr
        )


def _report(count: int, whose: str) -> None:
    print(f"verified: {count} tensors equal {whose}", file=sys.stderr)


def _verify_logits(checkpoint: Path, hf_folder: Path, comparable: bool) -> None:
    if comparable and parity.num_parameters(checkpoint) <= parity.SMALL_MODEL:
        error = parity.verify_logits(checkpoint, hf_folder)
        print(f"verified: fp32 logits differ by at most {error:.1e}", file=sys.stderr)


def check_output_is_free(output: str | os.PathLike[str], force: bool) -> None:
    """Check that the output can be written, before the conversion starts.

    Raises:
        HydraError: ``output`` exists and ``force`` is not given.
    """
    if Path(output).exists() and not force:
        raise HydraError(
            f"{output} exists already; choose another output, or --force to replace it"
        )


def _source(model: ModelConfig, weights: HfWeights, name: str, revision: str) -> dict[str, str]:
    """Source of the weights, with the fingerprint for head map checks."""
    from megatron_hydra.head_map import fingerprint_tensors
    from megatron_hydra.hf_identity import fingerprint_keys

    source = {"name": name, "revision": revision}
    if not model.is_hybrid:
        keys = fingerprint_keys(model.num_layers)
        source["fingerprint"] = fingerprint_tensors({key: weights[key] for key in keys})
    return source


def _make_student(
    folder: Path,
    dense: ModelConfig,
    tensors: LazyTensors,
    options: StudentOptions,
    dtype: torch.dtype | None,
) -> tuple[ModelConfig, LazyTensors, dict[str, Any]]:
    if dense.is_hybrid:
        raise HydraError(f"{folder} is a HydraHead model already; a head map needs a dense one")
    if options.head_map is None:
        model, map_fingerprint = dense.with_every_head_mixed(options.hydra), ""
    else:
        head_map = HeadMap.load(options.head_map)
        head_map.check_model(dense.identity(), source=str(options.head_map))
        model, map_fingerprint = (
            dense.with_head_map(head_map, options.hydra),
            head_map.fingerprint(),
        )
    gamma, statistics = _measured(folder, dense, model, options, dtype)
    student = initialise_student(
        tensors, model, gamma, options.seed, options.initial_values, statistics
    )
    calibrated_on = str(options.calibration_file or "bundled text")
    made = {
        "head_map_fingerprint": map_fingerprint,
        "student_init": to_dict(options.initial_values),
        "seed": options.seed,
        "gamma": "ones" if gamma is None else f"calibrated on {calibrated_on}",
    }
    if statistics is not None:
        made["statistics"] = {
            "text": calibrated_on,
            "half_life": [
                [round(life, 2) for life in row] for row in statistics.half_life.tolist()
            ],
        }
    return model, student, made


def _needs_gamma(model: ModelConfig, options: StudentOptions) -> bool:
    return options.calibrate and model.switches.fusion_norm == "rms"


def _measured(
    folder: Path,
    dense: ModelConfig,
    student: ModelConfig,
    options: StudentOptions,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, HeadStatistics | None]:
    """Run the teacher on calibration text; returns γ and head statistics for the student."""
    wants_gamma, wants_heads = _needs_gamma(student, options), options.initial_values.is_measured
    if not (wants_gamma or wants_heads):
        return None, None
    from transformers import AutoModel

    tokenizer = find_tokenizer(folder)
    batches = calibration_batches(
        tokenizer, dense.vocab_size, options.calibration_file or None, options.calibration_tokens
    )
    # The backbone without its LM head, in the student's dtype.
    backbone = load_hf_model(folder, dtype=dtype or "auto", model_class=AutoModel)
    gamma = calibrate_gamma(backbone, batches) if wants_gamma else None
    heads = (
        measure_heads(backbone, batches, options.initial_values.half_life) if wants_heads else None
    )
    return gamma, heads


# -- Megatron -> Hugging Face --------------------------------------------------------------------


def megatron_to_hf(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    verify: bool = False,
    force: bool = False,
    progress: bool = False,
) -> ModelConfig:
    """Convert a Megatron checkpoint to a Hugging Face folder; one shard is in memory at a time.

    A dense model becomes a plain folder of its family. A hybrid becomes a ``HydraHeadForCausalLM`` folder with
    its modelling code.

    Args:
        checkpoint: a checkpoint folder, or the ``checkpoints`` folder of a run (its latest one).
        output: the Hugging Face folder; it is written atomically.
        dtype: convert the weights; ``None`` keeps the checkpoint's dtype.
        max_shard_bytes: size of one safetensors file.
        verify: whether to read the folder before it gets its name and to compare every tensor. For a small
            model that ``dtype`` does not change, fp32 logits are compared, too.
        force: replace an existing ``output``.
        progress: show a bar on stderr.

    Returns:
        The config of the written model, which is the finished one.

    Raises:
        HydraError: the checkpoint is damaged, foreign or incomplete; nothing is written.
    """
    from tqdm import tqdm

    check_output_is_free(output, force)
    folder = store.resolve_checkpoint(checkpoint)
    store.verify_checkpoint(folder)
    model = store.read_model_config(folder).finished()
    stored = store.lazy_canonical(folder)
    dtypes = {
        key: dtype if dtype is not None and not is_fp32(key) else stored.describe(key).dtype
        for key in stored
    }

    def load(keys: list[str]) -> Mapping[str, torch.Tensor]:
        return {key: stored[key].to(dtypes[key]) for key in keys}

    shards = plan_shards(model, dtypes.__getitem__, max_shard_bytes)
    with atomic_folder(output, force=force) as temporary:
        _write_hf_metadata(temporary, folder, model, dtypes["embedding.word_embeddings.weight"])
        total = sum(num_bytes(m, dtypes[m.canonical]) for shard in shards for m in shard)
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="writing", disable=not progress
        ) as bar:
            write_hf_weights(temporary, shards, load, bar.update)
        if verify:
            _report(parity.verify_export(folder, temporary, dtype), "the checkpoint's")
            _verify_logits(folder, temporary, dtype is None)
    tokenizer = store.tokenizer_folder(checkpoint)
    if tokenizer is not None:
        _log_skipped_files(tokenizer)
    return model


def _write_hf_metadata(
    output: Path, checkpoint: Path, model: ModelConfig, dtype: torch.dtype
) -> None:
    from megatron_hydra.hf.export_files import auto_map, hf_export_files

    config = hf_config_from_model(model, dtype_name(dtype), auto_map())
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = store.tokenizer_folder(checkpoint)
    if tokenizer is not None:
        copy_tokenizer_files(tokenizer, output)
    if not model.is_hybrid:
        return
    for name, path in hf_export_files().items():
        shutil.copyfile(path, output / name)
    if model.head_map is not None:
        (output / HEAD_MAP_FILE).write_text(json.dumps(model.head_map, indent=1) + "\n")
