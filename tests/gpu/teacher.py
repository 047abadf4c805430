"""The quickstart's teacher with heads of 64 channels instead of 16, and the same function.

FLA's kernels and a GPU's tensor cores need larger heads than the tiny model has, and a random model would solve
no task. So every head gets channels that are zero. Rotary pairs keep their frequency (pair i of 8 turns as pair
4·i of 32). The norm of the queries cancels the changes that the larger head makes to the norms and to 1/√d.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HEAD_DIM = 64


def _places(old: int, new: int) -> torch.Tensor:
    """Indices ``[old]`` of a head's channels in a head with ``new`` channels."""
    pairs = torch.arange(old // 2) * (new // old)
    return torch.cat((pairs, new // 2 + pairs))


def _spread(x: torch.Tensor, axis: int, old: int, new: int) -> torch.Tensor:
    """Move the channels of all heads along ``axis`` to their new places, with zeros between them."""
    heads = x.unflatten(axis, (-1, old))
    shape = list(heads.shape)
    shape[axis + 1] = new
    out = x.new_zeros(shape)
    out.index_copy_(axis + 1, _places(old, new), heads)
    return out.flatten(axis, axis + 1)


def widen(
    source: Path, target: Path, head_dim: int = HEAD_DIM, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write the Qwen3 model in ``source`` to ``target`` with larger heads, and its tokenizer."""
    config = json.loads((source / "config.json").read_text())
    old = config["head_dim"]
    weights = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensor = _spread(tensor, 0, old, head_dim)
        elif name.endswith("o_proj.weight"):
            tensor = _spread(tensor, 1, old, head_dim)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            tensor = _spread(tensor, 0, old, head_dim)
            if "q_norm" in name:
                # Both norms have head_dim/old times as many channels for the same sum of squares, so queries
                # and keys grow by √(head_dim/old) each. 1/√d shrinks by this factor once.
                tensor = tensor / math.sqrt(head_dim / old)
        weights[name] = tensor.to(dtype).contiguous()
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("tokenizer*"):
        shutil.copyfile(file, target / file.name)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    changed = config | {"head_dim": head_dim, "dtype": str(dtype).rpartition(".")[2]}
    (target / "config.json").write_text(json.dumps(changed, indent=2) + "\n")
