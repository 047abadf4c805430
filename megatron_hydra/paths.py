"""Paths of users: ``~`` and ``$VARIABLE`` are expanded as in a shell."""

from __future__ import annotations

import os
import re
from typing import Annotated

from megatron_hydra.errors import HydraError

PathText = Annotated[str, "path"]
"""Type of a config field with a path; :func:`megatron_hydra.config.from_dict` expands it."""

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


def expanded(text: str) -> str:
    """A path with ``~``, ``~user``, ``$VARIABLE`` and ``${VARIABLE}`` replaced.

    Raises:
        HydraError: a variable is not set, the user does not exist, or the text has a NUL, which no path may
            have.
    """
    if "\0" in text:
        raise HydraError(f"{text!r} has a NUL character, which is not allowed in a path")

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name not in os.environ:
            raise HydraError(f"{text!r}: the environment has no variable {name}")
        return os.environ[name]

    path = os.path.expanduser(_VARIABLE.sub(value, text))
    if text.startswith("~") and path.startswith("~"):
        raise HydraError(
            f"{text!r}: no user of that name has a home folder; write ./{text} for a folder"
        )
    return path
