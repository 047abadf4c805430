"""GPUs by their data sheets, and assumed shares of these figures that kernels reach."""

from __future__ import annotations

import dataclasses
import math

from megatron_hydra.errors import HydraError
from megatron_hydra.training.flops import PEAK_TFLOPS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A data sheet (SXM modules; dense figures, no sparsity).

    Attributes:
        name: as on the command line.
        peak: bf16 matrix FLOP/s.
        bandwidth: of its memory, bytes/s.
        memory: bytes.
        nvlink: bytes/s that it sends to GPUs of its node (one direction).
        network: bytes/s that it sends to other nodes (one adapter for each GPU).
    """

    name: str
    peak: float
    bandwidth: float
    memory: float
    nvlink: float
    network: float


def _gpu(name: str, terabytes: float, gigabytes: float, nvlink: float, network: float) -> Gpu:
    return Gpu(
        name, PEAK_TFLOPS[name.upper()] * 1e12, terabytes * 1e12, gigabytes * 1e9, nvlink * 1e9,
        network * 1e9,
    )  # fmt: skip


GPUS = {
    "a100": _gpu("a100", 2.039, 80, 300, 25),
    "h100": _gpu("h100", 3.35, 80, 450, 50),
    "h200": _gpu("h200", 4.8, 141, 450, 50),
    "b200": _gpu("b200", 8.0, 180, 900, 50),
}
"""From NVIDIA's data sheets: A100 80GB, H100, H200, HGX B200. Networks are those of NVIDIA's DGX systems of the
same generation (200 Gbit/s per GPU for A100, 400 for the others)."""

GPUS_PER_NODE = 8


SECONDS = ("latency", "launch", "triton_launch")
MAY_BE_ZERO = ("overlap", "flash_qla")
"""Efficiencies that are not shares, and shares that may be 0."""


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet's figures: **assumptions** about a whole step.

    Shares of kernels are near their measurements on one H200 (docs/PERFORMANCE.md; a test compares them).
    docs/planning.md compares whole steps with measured ones.

    Attributes:
        matmul, attention, attention_backward: of the matrix peak.
        varlen: share of this speed that flash attention of packed documents reaches. It runs if blocks are not
            a dense batch (documents of unequal length, also under context parallelism).
        tail: share of this speed that the last queries of one long document reach, under context parallelism.
            cuDNN computes them by two products. If it cannot, the kernel of packed documents does, at
            the share ``varlen``.
        delta_rule: of the matrix peak, of FLA's Triton kernels at 128K tokens.
        flash_qla: the same for FlashQLA's kernels (0.27) if they can run (heads of 128). 0: they are not
            installed, and FLA's run.
        bandwidth: of the memory bandwidth.
        nvlink, network: of the links.
        usable: share of the memory; the rest is CUDA's context, NCCL's buffers and fragmentation.
        overlap: share of data-parallel traffic that computation hides.
        latency: seconds of even the smallest collective.
        launch: host seconds for a kernel that torch launches, including the code before it (modules, autograd,
            dispatch).
        triton_launch: host seconds for a kernel that Triton launches from Python.
    """

    matmul: float = 0.65
    attention: float = 0.65
    attention_backward: float = 0.50
    varlen: float = 0.53
    tail: float = 1.0
    delta_rule: float = 0.067
    flash_qla: float = 0.0
    bandwidth: float = 0.75
    nvlink: float = 0.70
    network: float = 0.70
    usable: float = 0.90
    overlap: float = 0.0
    latency: float = 20e-6
    launch: float = 56e-6
    triton_launch: float = 204e-6

    def changed(self, settings: list[str]) -> Efficiency:
        """A copy with some factors set, from ``name=value`` words.

        Raises:
            HydraError: an unknown name, a value that is not a share, seconds below 0.
        """
        known = [field.name for field in dataclasses.fields(self)]
        values = {}
        for word in settings:
            name, _, text = word.partition("=")
            if name not in known:
                raise HydraError(f"--efficiency {word}: unknown; known: {', '.join(known)}")
            try:
                values[name] = float(text)
            except ValueError:
                raise HydraError(f"--efficiency {word}: {text!r} is not a number") from None
            if name in SECONDS:
                if not 0 <= values[name] < math.inf:
                    raise HydraError(f"--efficiency {word}: give seconds, 0 or more")
            elif not 0 <= values[name] <= 1 or (values[name] == 0 and name not in MAY_BE_ZERO):
                least = "from 0" if name in MAY_BE_ZERO else "above 0 and"
                raise HydraError(f"--efficiency {word}: give a share {least} up to 1")
        return dataclasses.replace(self, **values)


def find_gpu(name: str) -> Gpu:
    """A GPU by its name.

    Raises:
        HydraError: it is not in the table.
    """
    if name not in GPUS:
        raise HydraError(f"--gpu {name}: unknown; known: {', '.join(GPUS)}")
    return GPUS[name]
