"""Worker: compile every Triton kernel of ours for a Hopper GPU, on a machine that has none.

The interpreter runs some code that the compiler refuses (a variable that changes its shape in a loop), so
interpreted tests do not find such a kernel. Kernels are compiled for the arguments of the calls in
``kernel_cases``: launches are recorded, not run. Prints one JSON line for each kernel.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_hydra.ops import (
    self_check,
    triton_chunk_loss,
    triton_delta_rule_gates,
    triton_fusion_tail,
    triton_qk_preparation,
    triton_short_conv,
    triton_squared_error,
)
from tests.ops import kernel_cases

TARGET = GPUTarget("cuda", 90, 32)
MODULES = (
    triton_chunk_loss, triton_delta_rule_gates, triton_fusion_tail, triton_qk_preparation, triton_short_conv,
    triton_squared_error,
)  # fmt: skip
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64",
    torch.int32: "*i32", torch.uint8: "*u8", int: "i32", float: "fp32",
}  # fmt: skip
SIZES = ("D", "BLOCK", "heads", "W")
"""Arguments that the line of a kernel shows."""
OPTIONS = ("num_warps", "num_stages")


class Anything:
    """A bound above every error, NaN too: nothing is computed, so nothing can be compared."""

    def __gt__(self, other) -> bool:
        return True


class Recorder:
    """Stands in for a kernel: compiles it for the arguments of a launch."""

    def __init__(self, name: str, kernel, compiled: dict) -> None:
        self.name, self.kernel, self.compiled = name, kernel, compiled

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
        bound = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants = {}, {}
        for parameter in self.kernel.params:
            value = bound[parameter.name]
            # At a real launch, the compiler also makes counts of 1 constants.
            is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or is_one:
                signature[parameter.name] = "constexpr"
                constants[(parameter.num,)] = value
            else:
                kind = value.dtype if isinstance(value, torch.Tensor) else type(value)
                signature[parameter.name] = TYPES[kind]
        key = (self.name, str(signature), str(constants), str(options))
        if key in self.compiled:
            return
        source = ASTSource(self.kernel, signature, constants)
        binary = triton.compile(source, target=TARGET, options=options)
        sizes = {p.name: bound[p.name] for p in self.kernel.params if p.name in SIZES}
        self.compiled[key] = {"kernel": self.name, **sizes, "bytes": len(binary.asm["cubin"])}


def main(arguments: list[str]) -> None:
    """Compile the kernels that checks launch; ``arguments``: names of checks; none: all."""
    compiled: dict = {}
    for module in MODULES:
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                setattr(module, name, Recorder(f"{module.__name__}.{name}", value, compiled))
    for module in (kernel_cases, self_check):
        module.TOLERANCE = dict.fromkeys(module.TOLERANCE, Anything())
    for check in kernel_cases.CHECKS:
        if arguments and check.__name__ not in arguments:
            continue
        check(torch.device("cpu"), torch.bfloat16)
    for built in compiled.values():
        print(json.dumps(built))


if __name__ == "__main__":
    main(sys.argv[1:])
