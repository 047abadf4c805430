"""Load a model for selection: device and dtype, weights, tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.hf_identity import read_config_json
from megatron_hydra.hf_loading import COMPUTED_DTYPES, load_hf_model
from megatron_hydra.ranks import Ranks
from megatron_hydra.selection.runner import DecoderRunner


@dataclasses.dataclass(frozen=True)
class Placement:
    """Device and dtype of the model.

    Attributes:
        device: ``auto`` (a GPU for each local rank, else the CPU) or a torch device.
        dtype: ``fp32``, ``bf16``, or ``auto``: the checkpoint's dtype on a GPU, fp32 on a CPU.
        gpus_per_process: spread the layers of one copy over this many GPUs.
    """

    device: str = "auto"
    dtype: str = "auto"
    gpus_per_process: int = 1

    def devices(self, local_rank: int) -> list[torch.device]:
        """The devices of one process.

        Raises:
            HydraError: torch does not know the device, or the machine has too few GPUs.
        """
        if self.device != "auto":
            try:
                return [torch.device(self.device)]
            except RuntimeError as error:
                raise HydraError(f"--device {self.device}: {error}") from None
        from megatron_hydra.parallel import platform

        if not platform.device_count():
            return [platform.device()]
        count = self.gpus_per_process
        first, there = local_rank * count, platform.device_count()
        if count < 1 or first + count > there:
            raise HydraError(
                f"--gpus-per-process {count}: rank {local_rank} of this machine needs GPUs "
                f"{first} to "
                f"{first + count - 1}, there are {there}; start fewer processes"
            )
        return [torch.device("cuda", i) for i in range(first, first + count)]

    def torch_dtype(self, devices: list[torch.device]) -> torch.dtype | str:
        """The ``dtype`` argument of ``from_pretrained``."""
        if self.dtype == "auto":
            return torch.float32 if devices[0].type == "cpu" else "auto"
        if self.dtype not in COMPUTED_DTYPES:
            raise HydraError(f"--dtype {self.dtype}: must be auto, {' or '.join(COMPUTED_DTYPES)}")
        return COMPUTED_DTYPES[self.dtype]


def load_runner(
    model: Any, folder: Path | None, placement: Placement, ranks: Ranks
) -> DecoderRunner:
    """Make a runner for a model, loaded from a folder or given.

    Raises:
        HydraError: the model cannot be loaded.
    """
    if folder is None:
        return DecoderRunner(model)
    devices = placement.devices(ranks.local_rank)
    loaded = load_hf_model(folder, dtype=placement.torch_dtype(devices), device=None)
    if len(devices) > 1:
        return DecoderRunner(loaded, devices)
    return DecoderRunner(loaded.to(devices[0]))


def native_length(model: Any, folder: Path | None) -> int:
    """Native context length of the model, or 0 if its config does not give it."""
    if folder is None:
        return int(getattr(model.config, "max_position_embeddings", 0) or 0)
    length = read_config_json(folder).get("max_position_embeddings")
    return length if isinstance(length, int) else 0


def vocab_size_of(model: Any, folder: Path | None) -> int:
    """Vocabulary size, from the folder's config or the loaded model's config."""
    if folder is None:
        return int(model.config.vocab_size)
    size = read_config_json(folder).get("vocab_size")
    if not isinstance(size, int):
        raise HydraError(f"{folder / 'config.json'}: key 'vocab_size' is missing or not an integer")
    return size
