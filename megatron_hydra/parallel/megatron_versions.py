"""Megatron-Core's releases: which of them work here, and everything that differs between them.

Everything that one release needs and another does not stands in this file, or is named in it:

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

What all of these releases get wrong is fixed in :mod:`megatron_hydra.training.megatron_fixes`. Checkpoints
depend on none of the above: they are written and read by :mod:`megatron_hydra.checkpoint`.

Nothing of Megatron-Core is imported before it is asked for: the version is known before anything breaks.
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
"""The first release that works, and the first that nobody has tried."""

REQUIREMENT = "megatron-core>=0.16.1,<0.20"
""":data:`SUPPORTED` in pip's words, as in pyproject.toml."""


@functools.cache
def installed() -> str:
    """The version of Megatron-Core that an import would find; it is not imported.

    Raises:
        HydraError: there is none, or none that says its version.
    """
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:  # the namespace `megatron` itself
        spec = None
    if spec is None or spec.origin is None:
        raise HydraError(f"megatron-core is not installed: pip install '{REQUIREMENT}'")
    path = Path(spec.origin).with_name("package_info.py")
    # Not run: since 0.19 it starts git, and adds the commit of whatever repository it lies in.
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
        HydraError: it does not begin with numbers.
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
        HydraError: naming it, and what to install.
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
    """Since 0.18: whether ``import megatron.core`` fails without triton (through ``paged_stash``)."""
    return _at_least(0, 18)


def asks_for_streams() -> bool:
    """Since 0.19: ``start_grad_sync`` takes ``torch.cuda.current_stream()``, to wait for CUDA graphs."""
    return _at_least(0, 19)


def config_options() -> dict[str, Any]:
    """Arguments of ``TransformerConfig`` that have another name in some releases.

    The default of this one warns of its own deprecation, for every model. We capture no CUDA graphs.
    """
    return {"cuda_graph_modules" if _at_least(0, 18) else "cuda_graph_scope": []}


def mlp_spec(submodules: MLPSubmodules) -> Any:
    """What ``TransformerLayerSubmodules.mlp`` takes for a dense MLP.

    Since 0.18 the layer calls it, where it was given to ``build_module`` before.
    """
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    if _at_least(0, 18):
        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


_EXPECTED: dict[str, str] = {
    # 0.19. The model is built by build_gpt_model alone, ready to be exchanged.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # 0.18. compute_full_param_layout, which it asks us to call, is what it then calls itself.
    "megatron.core.distributed.distributed_data_parallel": (
        "DistributedDataParallel: full_param_layout not provided"
    ),
}
"""Logger → how a warning begins that our own code is the reason of, and that no user can act on."""


def quiet() -> None:
    """Keep :data:`_EXPECTED` out of the logs. Other warnings of these modules stay."""
    for name, beginning in _EXPECTED.items():
        logging.getLogger(name).addFilter(_not_starting_with(beginning))


@functools.cache  # the same object is added to a logger once
def _not_starting_with(text: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(text)
