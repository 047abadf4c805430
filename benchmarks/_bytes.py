"""Bytes that a rank sends, counted at its calls of torch's collectives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist


@contextlib.contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Count the bytes that this rank sends in collectives and point-to-point, assuming ring algorithms.

    Yields:
        ``{"bytes": …}``, growing.
    """
    sent = {"bytes": 0}

    def wrap(function: Callable[..., Any], count: Callable[..., int]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            sent["bytes"] += count(*args, **kwargs)
            return function(*args, **kwargs)

        return counted

    def gathered(out: Any, x: Any, group: Any = None, **_: Any) -> int:
        return x.numel() * x.element_size() * (dist.get_world_size(group) - 1)

    def scattered(out: Any, x: Any, group: Any = None, **_: Any) -> int:
        return out.numel() * out.element_size() * (dist.get_world_size(group) - 1)

    def exchanged(out: Any, x: Any, group: Any = None, **_: Any) -> int:
        size = dist.get_world_size(group)
        return x.numel() * x.element_size() * (size - 1) // size

    def pointwise(operations: Any) -> int:
        return sum(
            op.tensor.numel() * op.tensor.element_size() for op in operations if op.op is dist.isend
        )

    counts = {
        "all_gather_into_tensor": gathered,
        "reduce_scatter_tensor": scattered,
        "all_to_all_single": exchanged,
        "batch_isend_irecv": pointwise,
    }
    with contextlib.ExitStack() as patches:
        for name, count in counts.items():
            patches.enter_context(mock.patch.object(dist, name, wrap(getattr(dist, name), count)))
        yield sent
