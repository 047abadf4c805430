"""What of the kernels' packages is installed, and what this GPU needs of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

import torch

from megatron_hydra.ops.kernels import Case

TILELANG = "tilelang==0.1.15"
"""What ``pip install`` takes; the version that was run."""

_TILELANG_TRITON = ((3, 4), (3, 7, 1))
"""On Hopper, FLA 0.6.0 refuses its backward with a Triton from the first version up to the second
(excluded) unless TileLang is there (``fla/ops/common/chunk_o.py``)."""


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it.

    A folder that only holds packages of others is none: flash-attn 4 comes as ``flash_attn.cute`` in a
    ``flash_attn`` without content.
    """
    try:
        spec = importlib.util.find_spec(module)
        return spec is not None and spec.origin is not None
    except ModuleNotFoundError:  # its parent package is absent
        return False


def needs_tilelang(case: Case) -> bool:
    """Whether FLA's backward runs here with TileLang only, and that is not installed."""
    first, fixed = _TILELANG_TRITON
    version = tuple(int(part) for part in re.findall(r"\d+", triton_version())[:3])
    return (
        case.device.type == "cuda"
        and is_hopper(case.device)
        and first <= version < fixed
        and not is_installed("tilelang")
    )


def triton_version() -> str:
    """``""`` where it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def is_hopper(device: torch.device) -> bool:
    """Whether this machine's GPU is an H100, an H200 or their like."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9
