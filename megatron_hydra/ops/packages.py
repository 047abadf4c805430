"""Which of the kernels' packages are installed, and which this GPU needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

import torch

from megatron_hydra.ops.kernels import Case

TILELANG = "tilelang==0.1.15"
"""Argument of ``pip install``; the tested version."""

_TILELANG_TRITON = ((3, 4), (3, 7, 1))
"""On Hopper without TileLang, FLA 0.6.0 refuses its backward with a Triton from the first version up to the
second one, which is excluded (``fla/ops/common/chunk_o.py``)."""


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it.

    A folder with only packages of other distributions is not a module: flash-attn 4 is ``flash_attn.cute`` in
    an otherwise empty ``flash_attn``.
    """
    try:
        spec = importlib.util.find_spec(module)
        return spec is not None and spec.origin is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def needs_tilelang(case: Case) -> bool:
    """Whether FLA's backward needs TileLang here, and TileLang is not installed."""
    first, fixed = _TILELANG_TRITON
    version = tuple(int(part) for part in re.findall(r"\d+", triton_version())[:3])
    return (
        case.device.type == "cuda"
        and is_hopper(case.device)
        and first <= version < fixed
        and not is_installed("tilelang")
    )


def triton_version() -> str:
    """The installed version of Triton; ``""`` without Triton."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def is_hopper(device: torch.device) -> bool:
    """Whether this machine's GPU is a Hopper, such as H100 or H200."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9
