"""Verify that an export equals its checkpoint, by tensors and by logits.

Both checks read the written files, not the tensors in memory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch

from megatron_hydra.checkpoint import store
from megatron_hydra.checkpoint.canonical import is_fp32
from megatron_hydra.config.run import RunConfig
from megatron_hydra.conversion.hf_config import read_hf_config, same_architecture
from megatron_hydra.conversion.hf_io import HfWeights, hf_to_canonical
from megatron_hydra.errors import HydraError
from megatron_hydra.hf_loading import load_hf_model

LOGITS_TOLERANCE = 1e-4
"""Largest difference of fp32 logits; relative to the largest logit if this is above 1."""

SMALL_MODEL = 500_000_000
"""Largest number of parameters for which ``--verify`` also compares logits (two fp32 copies in memory)."""


def num_parameters(checkpoint: str | os.PathLike[str]) -> int:
    """Number of parameters of a checkpoint's model, from its index."""
    shapes = [shape for shape, _ in store.stored_tensors(checkpoint).values()]
    return sum(torch.Size(shape).numel() for shape in shapes)


def verify_stored(checkpoint: str | os.PathLike[str], expected: Mapping[str, torch.Tensor]) -> int:
    """Compare a checkpoint with its source tensors, bit for bit; returns the number of tensors.

    Raises:
        HydraError: naming the first tensor that differs.
    """
    return _compare(store.lazy_canonical(checkpoint), expected, str(checkpoint))


def verify_export(
    checkpoint: str | os.PathLike[str],
    hf_folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
) -> int:
    """Read a Hugging Face folder and compare it with a checkpoint, bit for bit.

    Args:
        checkpoint: a verified checkpoint folder.
        hf_folder: the folder written from it.
        dtype: the dtype that the export was converted to, if any.

    Returns:
        The number of compared canonical tensors.

    Raises:
        HydraError: naming the first tensor or config that differs.
    """
    model = store.read_model_config(checkpoint).finished()
    if not same_architecture(read_hf_config(hf_folder), model):
        raise HydraError(f"{hf_folder}/config.json does not describe the model of {checkpoint}")
    exported = hf_to_canonical(HfWeights(hf_folder), model)
    return _compare(exported, store.lazy_canonical(checkpoint), str(hf_folder), dtype)


def _compare(
    written: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    source: str,
    dtype: torch.dtype | None = None,
) -> int:
    for key, wanted in expected.items():
        if dtype is not None and not is_fp32(key):
            wanted = wanted.to(dtype)
        found = written[key]
        if found.dtype != wanted.dtype or not _same_bits(found, wanted):
            raise HydraError(f"{source}: {key!r} differs from its source")
    return len(written)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality, in which NaN equals NaN."""
    return one.shape == other.shape and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def megatron_logits(checkpoint: str | os.PathLike[str], tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a checkpoint's finished Megatron model, in fp32 on one process.

    Args:
        checkpoint: a checkpoint folder that was verified.
        tokens: ``[T]`` int64, one document.

    Returns:
        ``[T, V]`` fp32 on the CPU.
    """
    from megatron_hydra.model.layer_spec import build_gpt_model
    from megatron_hydra.parallel import platform
    from megatron_hydra.parallel.packed_sequence import PackedSequence
    from megatron_hydra.parallel.world import start_world, stop_world

    folder = store.resolve_checkpoint(checkpoint)
    run = dataclasses.replace(RunConfig(), precision="fp32")
    start_world(run)
    try:
        finished = store.read_model_config(folder).finished()
        model = build_gpt_model(finished, run).to(platform.device()).eval()
        _load_weights(model, folder)
        packed = PackedSequence((0, tokens.numel()), device=platform.device())
        with torch.no_grad():
            logits = model(
                input_ids=tokens[None].to(platform.device()),
                position_ids=packed.positions_local[None],
                attention_mask=None,
                packed_seq_params=packed,
            )
        return logits[0].float().cpu()
    finally:
        stop_world()


def _load_weights(model: Any, folder: os.PathLike[str]) -> None:
    from megatron.core import parallel_state

    from megatron_hydra.checkpoint.sharded import load_sharded

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = model.sharded_state_dict(metadata={"dp_cp_group": group})
    # Stock linears declare an (empty) extra state, which checkpoints of any layout do not have.
    state = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
    loaded = load_sharded(state, store.resolve_checkpoint(folder) / store.WEIGHTS)
    model.load_state_dict(loaded, strict=False)


def hf_logits(folder: str | os.PathLike[str], tokens: torch.Tensor) -> torch.Tensor:
    """``[T, V]`` fp32 logits of a Hugging Face folder; a HydraHead runs this package's own code.

    Args:
        folder: a dense family's folder, or an export of ours.
        tokens: ``[T]`` int64.
    """
    loader: Any = None
    if read_hf_config(folder).is_hybrid:
        from megatron_hydra.hf.modeling_hydrahead import HydraHeadForCausalLM

        loader = HydraHeadForCausalLM
    model = load_hf_model(folder, dtype=torch.float32, device=None, model_class=loader)
    with torch.no_grad():
        return model(input_ids=tokens[None], use_cache=False).logits[0].float()


def verify_logits(
    checkpoint: str | os.PathLike[str], hf_folder: str | os.PathLike[str], length: int = 128
) -> float:
    """Run both models on the same random tokens in fp32; returns the largest difference of logits.

    Raises:
        HydraError: the difference is above :data:`LOGITS_TOLERANCE`.
    """
    model = store.read_model_config(checkpoint)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (length,), generator=generator)
    expected, found = megatron_logits(checkpoint, tokens), hf_logits(hf_folder, tokens)
    error = (expected - found).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    if not error <= LOGITS_TOLERANCE * scale:
        raise HydraError(
            f"{hf_folder}: its fp32 logits differ from those of {checkpoint} by {error:.2e}"
        )
    return error
