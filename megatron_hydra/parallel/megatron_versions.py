"""Supported releases of Megatron-Core, and all differences between them.

All code that only some releases need is in this file, or is listed here:

========  =====================================================  ========================================
since     upstream                                               here
========  =====================================================  ========================================
0.17      needs Python 3.12                                      :data:`SUPPORTED`: 3.11 stays on 0.16.1
0.18      ``TransformerLayer`` gives each submodule its ``name``  ``HydraAttention`` accepts it
0.18      ``import megatron.core`` imports triton, undeclared    :func:`needs_triton`; a dependency of ours
0.18      an MLP's ``ModuleSpec`` is rewrapped, with a warning   :func:`mlp_spec`
0.18      ``cuda_graph_scope`` is called ``cuda_graph_modules``;   :func:`config_options`
          its default is deprecated in every release
0.18      ``DistributedDataParallel`` lays its buffers out       :func:`quiet`: the same layout as before
          itself, with a warning
0.19      ``GPTModel`` is deprecated, with a warning             :func:`quiet`; docs/parallelism.md says why
                                                                 we stay
0.19      every gradient reduction asks for the current CUDA     ``platform.install``
          stream
========  =====================================================  ========================================

:mod:`megatron_hydra.training.megatron_fixes` fixes faults of all these releases. Checkpoints do not depend on
these differences, because :mod:`megatron_hydra.checkpoint` writes and reads them.

This module does not import Megatron-Core at its own import, so the version is checked before an import fails.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from megatron_hydra.errors import HydraError

if TYPE_CHECKING:
    from megatron.core.transformer.mlp import MLPSubmodules

Version: TypeAlias = tuple[int, int, int]

SUPPORTED: tuple[Version, Version] = ((0, 16, 1), (0, 20, 0))
"""The first release that works, and the first release that is not tested."""

REQUIREMENT = "megatron-core>=0.16.1,<0.20"
""":data:`SUPPORTED` as a requirement for pip, as in pyproject.toml."""


@functools.cache
def installed() -> str:
    """The version of the installed Megatron-Core, without importing it.

    Raises:
        HydraError: it is not installed, or does not give its version.
    """
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:  # the namespace `megatron` itself
        spec = None
    if spec is None or spec.origin is None:
        raise HydraError(f"megatron-core is not installed: pip install '{REQUIREMENT}'")
    path = Path(spec.origin).with_name("package_info.py")
    # Read the file without running it: since 0.19 it runs git and adds the commit of its folder's repository.
    try:
        parts = dict(_constants(path))
        return "{MAJOR}.{MINOR}.{PATCH}{PRE_RELEASE}".format_map(parts)
    except (OSError, SyntaxError, KeyError) as error:
        raise HydraError(
            f"{path} does not say which megatron-core this is ({error!r}): pip install '{REQUIREMENT}'"
        ) from None


def _constants(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, value) of a file's ``NAME = literal``."""
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.Assign(targets=[ast.Name(name)], value=ast.Constant(value)):
                yield name, value


def numbers(version: str) -> Version:
    """``"0.19.2rc1"`` → (0, 19, 2). A release candidate counts as its release.

    Raises:
        HydraError: it does not start with numbers.
    """
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if match is None:
        raise HydraError(
            f"megatron-core calls its version {version!r}: pip install '{REQUIREMENT}'"
        )
    major, minor, patch = match.groups(default="0")
    return int(major), int(minor), int(patch)


def check(version: str) -> None:
    """Check that the installed release is :data:`SUPPORTED`.

    Raises:
        HydraError: it is not; names it and the release to install.
    """
    first, beyond = SUPPORTED
    if first <= numbers(version) < beyond:
        return
    newer = numbers(version) >= beyond
    raise HydraError(
        f"megatron-core {version} is installed, which is too {'new' if newer else 'old'} for this "
        f"version of megatron_hydra: pip install '{REQUIREMENT}' (0.17 and later need Python 3.12)"
    )


def _at_least(*release: int) -> bool:
    return numbers(installed()) >= (*release, 0)


def needs_triton() -> bool:
    """Whether ``import megatron.core`` fails without triton (because of ``paged_stash``): since 0.18."""
    return _at_least(0, 18)


def asks_for_streams() -> bool:
    """Whether ``start_grad_sync`` calls ``torch.cuda.current_stream()`` (for CUDA graphs): since 0.19."""
    return _at_least(0, 19)


def config_options() -> dict[str, Any]:
    """Arguments of ``TransformerConfig`` whose name differs between releases.

    We set it because its default gives a deprecation warning for every model. We capture no CUDA graphs.
    """
    return {"cuda_graph_modules" if _at_least(0, 18) else "cuda_graph_scope": []}


def mlp_spec(submodules: MLPSubmodules) -> Any:
    """The value of ``TransformerLayerSubmodules.mlp`` for a dense MLP.

    Since 0.18 the layer calls it; before, the layer passed it to ``build_module``.
    """
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    if _at_least(0, 18):
        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


_EXPECTED: dict[str, str] = {
    # 0.19. Only build_gpt_model builds the model, so it can be replaced easily.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # 0.18. It asks us to call compute_full_param_layout, but calls this function itself.
    "megatron.core.distributed.distributed_data_parallel": (
        "DistributedDataParallel: full_param_layout not provided"
    ),
}
"""Logger → beginning of a warning that our own code causes and that a user cannot change."""


def quiet() -> None:
    """Filter the warnings :data:`_EXPECTED` from the logs. Other warnings of these modules stay."""
    for name, beginning in _EXPECTED.items():
        logging.getLogger(name).addFilter(_not_starting_with(beginning))


@functools.cache  # a logger adds the same object only once
def _not_starting_with(text: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(text)
