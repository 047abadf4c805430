"""megatron_hydra: head-level hybrids of full attention and Gated DeltaNet on Megatron-Core.

    import megatron_hydra as mh
    mh.select_heads("path/to/model", ratio="3:1").save("head_map.json")

``examples/`` shows the three uses of the names below: choose heads, use an export, add a capability. Names are
imported at their first use, so importing this package needs no GPU library, and imports neither torch nor
Megatron-Core.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from megatron_hydra.version import __version__

if TYPE_CHECKING:
    from megatron_hydra.config.selection import Constraints, SelectionOptions
    from megatron_hydra.conversion.convert import StudentOptions, hf_to_megatron, megatron_to_hf
    from megatron_hydra.errors import HydraError
    from megatron_hydra.head_map import HeadMap
    from megatron_hydra.hf_loading import load_hf_model, load_tokenizer
    from megatron_hydra.quickstart.shipped import shipped_teacher
    from megatron_hydra.selection.capabilities import Capability, register_capability
    from megatron_hydra.selection.prompts import PromptPair
    from megatron_hydra.selection.select import recut, select_heads

# Every process would say five times that it falls back to torch. Runs record the kernels that they use.
warnings.filterwarnings(
    "ignore", message=r".*\b(Apex|Transformer Engine)\b.* not installed", module=r"megatron\.core\b"
)
# Megatron-Core's distributed optimizer reads the gradients of its own views of fp32 parameters, on purpose.
warnings.filterwarnings(
    "ignore", message=r"The \.grad attribute of a Tensor", module=r"megatron\.core\.optimizer\b"
)

__all__ = [
    "__version__",
    "Capability",
    "Constraints",
    "HeadMap",
    "HydraError",
    "PromptPair",
    "SelectionOptions",
    "StudentOptions",
    "hf_to_megatron",
    "load_hf_model",
    "load_tokenizer",
    "megatron_to_hf",
    "recut",
    "register_capability",
    "select_heads",
    "shipped_teacher",
]

_MODULES = {
    "conversion.convert": ("StudentOptions", "hf_to_megatron", "megatron_to_hf"),
    "config.selection": ("Constraints", "SelectionOptions"),
    "errors": ("HydraError",),
    "head_map": ("HeadMap",),
    "hf_loading": ("load_hf_model", "load_tokenizer"),
    "quickstart.shipped": ("shipped_teacher",),
    "selection.capabilities": ("Capability", "register_capability"),
    "selection.prompts": ("PromptPair",),
    "selection.select": ("recut", "select_heads"),
}


def __getattr__(name: str) -> Any:
    """Import the module of a name of ``__all__`` at its first use (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"megatron_hydra.{module}"), name)
    raise AttributeError(f"module 'megatron_hydra' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
