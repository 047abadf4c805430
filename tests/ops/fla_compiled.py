"""How many kernels FLA's gated delta rule compiles for an H100, on a machine without one.

    TRITON_CACHE_DIR=EMPTY_FOLDER python -m tests.ops.fla_compiled --heads 16 9 [--backward] [--threads 8]

Triton compiles them for sm_90 with its own ptxas. Nothing is launched, and all configurations count as equally
fast. Prints one JSON line for each number of heads, in the given order: number of kernels and seconds. After
the first number, the choices are written to disk, as before a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import types
from typing import Any

import torch
from triton import compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_hydra.ops import fla_tuning
from megatron_hydra.ops.kernels import Case

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132,
    shared_memory_per_block_optin=232448,
)  # fmt: skip


class H100:
    """A Triton driver of a card that this machine does not have."""

    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32,
        }
    )  # fmt: skip

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        return lambda call, quantiles: (call(), [1.0, 1.0, 1.0])[1]


def pretend() -> list[str]:
    """Make Triton and FLA see an H100; returns a list that gets the name of each compiled kernel."""
    driver.set_active(H100())
    torch.cuda.get_device_name = lambda *args: PROPERTIES.name  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *args: (9, 0)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda *args: PROPERTIES  # type: ignore[assignment]
    torch.cuda.is_available = lambda: True
    launch, compile_, compiled = JITFunction.run, compiler.compile, []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    def recorded(source: Any, *args: Any, **options: Any) -> Any:
        compiled.append(source.name)
        return compile_(source, *args, **options)

    JITFunction.run, compiler.compile = run, recorded
    return compiled


def call(heads: int, head_dim: int, backward: bool) -> None:
    """The delta rule of a packed stream of 1,024 tokens."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    tokens, boundaries = 1024, torch.tensor([0, 300, 1024])
    q, k, v = (
        torch.randn(1, tokens, heads, head_dim, dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    log_alpha, beta = (-torch.rand(1, tokens, heads).requires_grad_() for _ in range(2))
    output, _ = chunk_gated_delta_rule(
        q, k, v, log_alpha, beta, cu_seqlens=boundaries, cu_seqlens_cpu=boundaries
    )
    if backward:
        output.sum().backward()


def main() -> None:
    """Compile the kernels for every number of heads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 9])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--threads", type=int, default=2, help="0: compile one by one")
    options = parser.parse_args()
    compiled = pretend()
    fla_tuning.use_choices(Case(torch.device("cpu"), torch.bfloat16, options.head_dim))
    fla_tuning.import_fla()
    from fla.utils import decorators

    decorators.custom_device_ctx = lambda index: contextlib.nullcontext()
    together = fla_tuning.configurations_compiled_together(max(1, options.threads))
    with together if options.threads else contextlib.nullcontext():
        for heads in options.heads:
            before, started = len(compiled), time.monotonic()
            call(heads, options.head_dim, options.backward)
            fla_tuning.write_choices()
            names = compiled[before:]
            found = {"heads": heads, "compiled": len(names), "kernels": len(set(names))}
            print(json.dumps(found | {"seconds": round(time.monotonic() - started, 1)}), flush=True)


if __name__ == "__main__":
    main()
