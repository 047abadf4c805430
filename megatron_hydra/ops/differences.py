"""How far a kernel's results are from its reference's."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def first_difference(
    results: Mapping[str, tuple[torch.Tensor, torch.Tensor]], tolerance: float
) -> str | None:
    """The first result that is too far from its reference.

    Args:
        results: by name, what a kernel computed and its reference in fp32, of equal shapes.
        tolerance: largest ‖got − want‖ / ‖want‖.

    Returns:
        A sentence without a full stop; ``None`` if all results are right.
    """
    for what, (got, want) in results.items():
        got, want = got.detach().float(), want.detach()
        distance = float((got - want).norm() / want.norm().clamp_min(1e-20))
        if not distance < tolerance:  # NaN must fail
            return f"{what} differs from the reference by {distance:.1%}"
    return None
