"""Worker: compile the kernels of fused decode steps for a Hopper GPU, on a machine that has none.

It works like tests/ops/compiled.py. It prints one line for each kernel.
"""

from __future__ import annotations

import sys

import torch

from megatron_hydra.hf import decode_hydrahead as decode
from tests.hf import decode_cases
from tests.hf.models import tokens
from tests.ops.compiled import Recorder

KINDS = ("without-fa-or-gdn", "biases", "wide")


def main() -> None:
    """Record launches instead of running them."""
    compiled: dict = {}
    for name, value in list(vars(decode).items()):
        if name.endswith("_kernel"):
            setattr(decode, name, Recorder(name, value, compiled))
    decode.INTERPRETED = True
    for kind in sys.argv[1:] or KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            model = decode_cases.model_of(kind, torch.device("cpu"), dtype)
            for name, padding in (("dynamic", 0), ("static", 3)):
                cache = decode_cases.filled(model, name, padding, torch.device("cpu"), 9, 3000)
                with torch.no_grad():
                    model(tokens(2, 5), past_key_values=cache)
                    model(tokens(2, 1), past_key_values=cache)
    for built in compiled.values():
        print(built["kernel"], built["bytes"])


if __name__ == "__main__":
    main()
