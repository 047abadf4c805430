"""Select the implementation of each kernel, once per run, by name or by ``auto`` (design §7).

Every kernel has a torch twin that runs anywhere. On a GPU, ``auto`` takes the fastest one that is installed and
supports the model's shape and precision. A named kernel that cannot run here is an error with the reason.
Before their first use on a GPU, the chosen kernels are compared with the twins on small inputs
(:mod:`megatron_hydra.ops.self_check`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_hydra.config.run import BackendConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.ops import (
    kernel_cache,
    packages,
)
from megatron_hydra.ops.kernels import FLA_BACKENDS, Case, DeltaRule, Kernels
from megatron_hydra.ops.linear_rules import FlaKernels


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to run a part.

    Attributes:
        name: as in the config.
        missing: why it cannot run a case here; ``None``: it can.
        load: imports it and returns its kernels by their names in :class:`Kernels`; every call returns the same
            objects.
        install: arguments of ``pip install`` for it; empty: it needs no package.
    """

    name: str
    missing: Callable[[Case], str | None]
    load: Callable[[], dict[str, Any]]
    install: str = ""


def _needs(*modules: str, low_precision: bool = True, head_dims: int = 256) -> Callable:
    """A check of requirements: a GPU, installed modules, bf16 or fp16, a head dimension."""

    def missing(case: Case) -> str | None:
        if case.device.type != "cuda":
            return "it needs a GPU"
        absent = [name for name in modules if not packages.is_installed(name)]
        if absent:
            return f"{' or '.join(absent)} is not installed"
        if low_precision and case.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in bf16 or fp16, the run in {str(case.dtype).rpartition('.')[2]}"
        if case.head_dim > head_dims or case.head_dim % 8:
            return f"head dimension {case.head_dim}: it takes multiples of 8 up to {head_dims}"
        return None

    return missing


def _fla_missing(case: Case) -> str | None:
    if case.rule.fla is None:
        return f"flash-linear-attention has no kernels of the {case.rule.title}"
    reason: str | None = _needs("fla", "triton")(case)
    return reason


def _flash_attn_missing(case: Case) -> str | None:
    version_3, version_2 = _needs("flash_attn_interface")(case), _needs("flash_attn")(case)
    return None if version_3 is None else version_2


@functools.cache
def _load_flash_attn() -> dict[str, Any]:
    from megatron_hydra.ops import gpu_attention

    return {"attention": gpu_attention.flash_attn_varlen()}


@functools.cache
def _load_torch_varlen() -> dict[str, Any]:
    from megatron_hydra.ops import gpu_attention

    return {"attention": gpu_attention.torch_varlen()}


@functools.cache
def _load_transformer_engine() -> dict[str, Any]:
    from megatron_hydra.ops import gpu_attention

    return {"attention": gpu_attention.transformer_engine_varlen()}


_PACKED = {
    "flash_attn_interface": _load_flash_attn,
    "torch.nn.attention.varlen": _load_torch_varlen,
    "flash_attn": _load_flash_attn,
}
"""Module -> loader of the kernel that computes packed documents and shards in addition to SDPA. The fastest
comes first: version 3 of flash-attn, torch's own, version 2."""


def _sdpa_missing(case: Case) -> str | None:
    reason: str | None = _needs()(case)
    if reason is None and not any(packages.is_installed(module) for module in _PACKED):
        return "packed documents need flash-attn or torch 2.10 beside it, and neither is installed"
    return reason


@functools.cache
def _load_sdpa() -> dict[str, Any]:
    from megatron_hydra.ops import gpu_attention, tail_attention

    module = next(module for module in _PACKED if packages.is_installed(module))
    packed = _PACKED[module]()["attention"]
    # flash-attn 3 has Hopper's instructions itself, the other kernels of packed documents have not.
    faster = module != "flash_attn_interface" and torch.cuda.is_available()
    tail = tail_attention.cudnn_kernel if faster else None
    dense = gpu_attention.sdpa_attention
    return {"attention": gpu_attention.dense_or_packed(dense, packed, tail)}


@functools.cache
def _load_fla() -> dict[str, Any]:
    from megatron_hydra.ops import fla_tuning
    from megatron_hydra.ops.fla_delta_rule import fla_gated_delta_rule

    fla_tuning.import_fla()

    return {"delta_rule": fla_gated_delta_rule}


@functools.cache
def _load_fla_cp() -> dict[str, Any]:
    from megatron_hydra.ops import fla_tuning
    from megatron_hydra.ops.fla_delta_rule import fla_own_context_parallel

    fla_tuning.import_fla()

    return {"delta_rule": fla_own_context_parallel}


@functools.cache
def load_triton() -> dict[str, Any]:
    """The fused kernels, by their names in :class:`.Kernels`."""
    from megatron_hydra.ops import (
        triton_delta_rule_gates,
        triton_delta_rule_inputs,
        triton_fusion_tail,
        triton_qk_preparation,
    )

    return {
        "fusion_tail": triton_fusion_tail.fusion_tail,
        "prepare_queries_and_keys": triton_qk_preparation.prepare_queries_and_keys,
        "delta_rule_gates": triton_delta_rule_gates.delta_rule_gates,
        "delta_rule_inputs": triton_delta_rule_inputs.delta_rule_inputs,
    }


_TORCH = Backend("torch", lambda case: None, dict)

FLASH_ATTN = "--no-build-isolation flash-attn>=2.7"
TRITON = "triton>=3.3"
FLA = "fla-core==0.6.0 flash-linear-attention==0.6.0"
"""Arguments of ``pip install``; the tested versions. A test compares them with pyproject.toml."""

_SLOW = {
    "gated_delta_net": "the recurrence runs as thousands of small operations, most of a step's time, and "
    "keeps several times the memory",
    "full_attention": "attention scores are kept for the backward: time and memory grow with the square "
    "of a document's length",
    "fused_kernels": "q/k preparation, short convolution, fusion tail and losses run operation by operation",
}
"""Key -> effect of the torch twin on a GPU."""

BACKENDS: dict[str, tuple[Backend, ...]] = {
    "full_attention": (
        Backend("sdpa", _sdpa_missing, _load_sdpa, FLASH_ATTN),
        Backend("flash_attn", _flash_attn_missing, _load_flash_attn, FLASH_ATTN),
        Backend("varlen", _needs("torch.nn.attention.varlen"), _load_torch_varlen, "torch>=2.10"),
        Backend(
            "transformer_engine",
            _needs("transformer_engine"),
            _load_transformer_engine,
            "--no-build-isolation transformer-engine[pytorch]>=2.0",
        ),
        _TORCH,
    ),
    "gated_delta_net": (
        Backend("fla", _fla_missing, _load_fla, FLA),
        Backend("fla_cp", _fla_missing, _load_fla_cp, FLA),
        _TORCH,
    ),
    "fused_kernels": (
        Backend("triton", _needs("triton", low_precision=False), load_triton, TRITON),
        _TORCH,
    ),
}
"""Key of the ``backend`` section -> its back ends, in the order that ``auto`` prefers."""


def choose_kernels(backend: BackendConfig, case: Case, *, check: bool = True) -> Kernels:
    """Resolve a run's ``backend`` section; on a GPU, check the chosen kernels.

    Args:
        backend: names, or ``auto``.
        case: the device, precision and head dimension to choose for.
        check: compare the chosen kernels with their twins (GPU only; once per process and choice).

    Raises:
        HydraError: a name that does not exist, a back end that cannot run here, or one whose
            results differ from its twin's; the message names the key.
    """
    if case.device.type == "cuda":
        kernel_cache.keep_triton_folder()
    chosen: dict[str, Any] = {"delta_rule": case.rule.twin}
    names = {}
    for key, candidates in BACKENDS.items():
        selected = _select(key, getattr(backend, key), candidates, case)
        if selected.name in FLA_BACKENDS:
            from megatron_hydra.ops import fla_tuning

            fla_tuning.use_choices(case, flas_own_cp=selected.name == "fla_cp")
        chosen.update(_loaded(key, selected))
        if selected.name in FLA_BACKENDS:
            assert case.rule.fla is not None  # _fla_missing
            chosen["delta_rule"] = _of_rule(chosen["delta_rule"], case.rule.fla)
        names[key] = selected.name
    kernels = Kernels(**chosen, names=names)
    if check and case.device.type == "cuda":
        from megatron_hydra.ops.self_check import check_kernels

        check_kernels(kernels, case)
    return kernels


@functools.cache  # every call returns the same function, as for all kernels
def _of_rule(kernel: DeltaRule, fla: FlaKernels) -> DeltaRule:
    """FLA's function for one rule."""
    return functools.partial(kernel, fla=fla)


def resolved_names(backend: BackendConfig, case: Case) -> dict[str, str]:
    """Key -> the back end that :func:`choose_kernels` takes; loads and checks nothing.

    Raises:
        HydraError: a name that does not exist or cannot run here.
    """
    return {
        key: _select(key, getattr(backend, key), candidates, case).name
        for key, candidates in BACKENDS.items()
    }


def slow_paths(backend: BackendConfig, case: Case) -> list[str]:
    """Describe the keys that ``auto`` resolves to the slow torch twin on a GPU, and how to fix them.

    Args:
        backend: the run's section.
        case: as for :func:`choose_kernels`; nothing is loaded or checked.

    Returns:
        One or two sentences for each such key; an empty list without a GPU.
    """
    if case.device.type != "cuda":
        return []
    found = []
    for key, candidates in BACKENDS.items():
        if getattr(backend, key) != "auto" or (key == "gated_delta_net" and not case.gdn_heads):
            continue
        if _select(key, "auto", candidates, case).name != "torch":
            continue
        preferred = candidates[0]
        found.append(
            f"backend.{key}: auto falls back to torch on this GPU, {_SLOW[key]}. {preferred.name} cannot "
            f"run here: {preferred.missing(case)}{_remedy(preferred, case)}"
        )
    return found


def _remedy(backend: Backend, case: Case) -> str:
    """``; pip install …`` for a back end that is not installed; else an empty string."""
    reason = backend.missing(case) or ""
    if not backend.install or "installed" not in reason:
        return ""
    text = f"; pip install {_quoted(backend.install)}"
    if backend.name in FLA_BACKENDS and packages.needs_tilelang(case):
        version = packages.triton_version()
        text += (
            f" {packages.TILELANG} (Triton {version} on Hopper needs TileLang for FLA's backward)"
        )
    return text


def _quoted(packages: str) -> str:
    """Words with ``>`` or ``[`` quoted for a shell."""
    return " ".join(f"'{word}'" if set(word) & set("<>[") else word for word in packages.split())


def _select(key: str, name: str, candidates: tuple[Backend, ...], case: Case) -> Backend:
    """The named back end, or for ``auto`` the first that can run the case."""
    if name == "auto":
        return next(b for b in candidates if b.missing(case) is None)
    for candidate in candidates:
        if candidate.name == name:
            reason = candidate.missing(case)
            if reason is not None:
                raise HydraError(
                    f"backend.{key}={name} cannot run here: {reason}{_remedy(candidate, case)}; or name "
                    f"another one ({', '.join(_available(candidates, case))}) or auto"
                )
            return candidate
    raise HydraError(
        f"backend.{key}={name!r} does not exist; available: "
        f"{', '.join(_available(candidates, case))}, and auto"
    )


def _loaded(key: str, backend: Backend) -> dict[str, Any]:
    """Load the kernels of a backend.

    Raises:
        HydraError: an installed package fails to import.
    """
    try:
        return backend.load()
    except (ImportError, OSError) as error:  # OSError: a shared library that it needs
        raise HydraError(
            f"backend.{key}={backend.name} is installed but cannot be imported: {error}; fix its "
            f"installation (pip install --force-reinstall --no-deps {_quoted(backend.install)}) or set "
            f"backend.{key} to another one"
        ) from error


def _available(candidates: tuple[Backend, ...], case: Case) -> list[str]:
    return [b.name for b in candidates if b.missing(case) is None]
