"""Worker: logits of converted checkpoints under tensor parallelism, against transformers' logits.

test_converted.py runs it under torchrun. The folder has, for every case, a checkpoint and
``<case>.safetensors`` with ``tokens`` and ``logits``. Prints one JSON line for each case and layout.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from megatron_hydra.parallel import platform

platform.install()

from megatron.core.tensor_parallel import (  # noqa: E402
    gather_from_tensor_model_parallel_region,
)
from safetensors.torch import load_file  # noqa: E402

from megatron_hydra.checkpoint import store  # noqa: E402
from megatron_hydra.config.run import ParallelConfig, RunConfig  # noqa: E402
from megatron_hydra.model.layer_spec import build_gpt_model  # noqa: E402
from megatron_hydra.parallel.packed_sequence import PackedSequence  # noqa: E402
from megatron_hydra.parallel.world import start_world, stop_world  # noqa: E402
from megatron_hydra.training.model_state import load_model, verified_checkpoint  # noqa: E402

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2-sp-seq": ParallelConfig(tensor=2, sequence=True, fa_partition="sequence"),
}


def logits_of(checkpoint: Path, tokens: torch.Tensor, run: RunConfig) -> torch.Tensor:
    """``[T, V]`` logits on every rank."""
    folder = verified_checkpoint(str(checkpoint))
    model = build_gpt_model(store.read_model_config(folder), run)
    load_model([model], folder)
    packed = PackedSequence((0, tokens.numel()))
    with torch.no_grad():
        local = model(
            input_ids=tokens[None],
            position_ids=packed.positions_local[None],
            attention_mask=None,
            packed_seq_params=packed,
        )
    return gather_from_tensor_model_parallel_region(local)[0]


def main(folder: Path) -> None:
    """Compare every case under every layout."""
    runs = {
        name: dataclasses.replace(RunConfig(), precision="fp32", parallel=parallel)
        for name, parallel in LAYOUTS.items()
    }
    world = start_world(runs["tp2"])  # the process groups of both layouts are the same
    for layout, run in runs.items():
        for file in sorted(folder.glob("*.safetensors")):
            reference = load_file(file)
            found = logits_of(folder / file.stem, reference["tokens"], run)
            error = (found - reference["logits"]).abs().max().item()
            if world.is_main:
                print(json.dumps({"case": file.stem, "layout": layout, "error": error}), flush=True)
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
