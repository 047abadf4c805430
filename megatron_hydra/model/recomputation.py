"""Parts of the attention that the backward computes again instead of keeping their tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


class Recomputation:
    """Calls functions, and calls them again in the backward if their part is named.

    Args:
        parts: ``attention``, or of ``fa``, ``gdn`` and ``tail``.
    """

    def __init__(self, parts: Collection[str] = ()) -> None:
        self.parts = frozenset(parts)

    def __call__(self, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``."""
        if part not in self.parts or not torch.is_grad_enabled():
            return function(*arguments)
        # Stopping a recomputation early could skip a collective on some ranks only.
        with set_checkpoint_early_stop(False):
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
