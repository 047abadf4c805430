"""FLA's kernels of shards in Triton's interpreter, against the twin on the whole stream; prints errors.

TRITON_INTERPRET=1 python -m tests.ops.fla_shards_interpreted

In the interpreter, a loop's index is a Python number without ``.to``. So the kernels are read from a copy of
FLA that does not call it. Every kernel runs in its first configuration, because nothing can be timed.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from triton.runtime.autotuner import Autotuner

from megatron_hydra.ops.fla_shard_kernels import FlaShardKernels
from megatron_hydra.ops.gated_delta_rule import chunked_gated_delta_rule
from megatron_hydra.ops.sharded_delta_rule import ShardsHere, sharded_gated_delta_rule

CASES: tuple[tuple[tuple[int, ...], int, list[int]], ...] = (
    ((0, 192), 3, []),
    ((0, 70, 71, 200, 330), 3, []),
    ((0, 30, 320), 4, []),
    ((0, 192), 2, [5, 6, 70, 71, 100]),
)
"""Documents, number of shards, and tokens with log α = −80: the exponential of a chunk's sum overflows."""

CHANGES = {
    "ops/common/chunk_delta_h.py": ("i_t.to(tl.int64)", "i_t"),
    "ops/common/chunk_o.py": ("(B * T).to(tl.int64)", "(B * T)"),
}


def copy_of_fla(folder: Path) -> None:
    """Write a changed copy of FLA to ``folder``; later imports read it."""
    spec = importlib.util.find_spec("fla")
    assert spec is not None and spec.origin is not None
    target = folder / "fla"
    shutil.copytree(Path(spec.origin).parent, target, ignore=shutil.ignore_patterns("__pycache__"))
    for name, (old, new) in CHANGES.items():
        text = (target / name).read_text()
        assert old in text
        (target / name).write_text(text.replace(old, new))
    sys.path.insert(0, str(folder))


def first_configuration_only() -> None:
    made = Autotuner.__init__

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.configs = self.configs[:1]

    Autotuner.__init__ = make


def errors(cu: tuple[int, ...], size: int, emptied: list[int]) -> dict[str, float]:
    """Errors of the output and of every gradient."""
    generator, shape = torch.Generator().manual_seed(0), (cu[-1], 1, 16)
    q, k, v, cotangent = (torch.randn(shape, generator=generator) for _ in range(4))
    rates = torch.rand(2, *shape[:2], generator=generator)
    k = torch.nn.functional.normalize(k, dim=-1)
    log_alpha = -0.02 * rates[0]
    log_alpha[emptied] = -80.0
    inputs = [x.requires_grad_() for x in (q, k, v, log_alpha, 0.3 * rates[1])]
    found = []
    for output in (
        sharded_gated_delta_rule(FlaShardKernels(), tuple(inputs), ShardsHere(cu, size)),
        chunked_gated_delta_rule(*inputs, cu)[0],
    ):
        found.append([output, *torch.autograd.grad(output, inputs, cotangent)])
    names = ("output", "q", "k", "v", "log α", "β")
    return {
        name: float((a - b).norm() / b.norm()) for name, a, b in zip(names, *found, strict=True)
    }


def main() -> None:
    first_configuration_only()
    with tempfile.TemporaryDirectory() as folder:
        copy_of_fla(Path(folder))
        for case in CASES:
            print(json.dumps(errors(*case)), flush=True)


if __name__ == "__main__":
    main()
