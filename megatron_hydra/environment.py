"""Numbers that launchers set in the environment."""

from __future__ import annotations

import os

from megatron_hydra.errors import HydraError


def environment_number(name: str, default: int) -> int:
    """A whole number, at least 0, such as torchrun's ``RANK`` and ``WORLD_SIZE``.

    Raises:
        HydraError: the variable is set to something else.
    """
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdecimal():
        raise HydraError(
            f"the environment has {name}={text}: it must be a whole number; torchrun and launch/*.sh set it, "
            "unset it to run one process"
        )
    return int(text)


def world_size_from_environment() -> int:
    """Number of processes of this run, before any initialisation: torchrun's ``WORLD_SIZE``, or 1.

    Raises:
        HydraError: it is not a number above 0, or ``RANK`` is not below it.
    """
    size, rank = environment_number("WORLD_SIZE", 1), environment_number("RANK", 0)
    if not rank < size:
        raise HydraError(
            f"the environment has RANK={rank} and WORLD_SIZE={size}: start it with torchrun"
        )
    return size
