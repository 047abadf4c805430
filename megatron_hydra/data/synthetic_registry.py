"""Synthetic tasks by name (see :mod:`~megatron_hydra.data.synthetic`)."""

from __future__ import annotations

from collections.abc import Callable

from megatron_hydra.data.document import Document

Generator = Callable[..., list[Document]]
TASKS: dict[str, Generator] = {}
"""Filled by :func:`synthetic_task`."""


def synthetic_task(name: str) -> Callable[[Generator], Generator]:
    """Register a generator under ``name``.

    Raises:
        ValueError: the name is taken.
    """

    def register(generator: Generator) -> Generator:
        if name in TASKS:
            raise ValueError(f"synthetic task {name!r} is registered already")
        TASKS[name] = generator
        return generator

    return register
