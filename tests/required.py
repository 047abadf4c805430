"""Tests that need special equipment: skipped without it, unless the machine declares that it has it."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

VARIABLE = "HYDRA_REQUIRE"
"""Environment variable: comma-separated names of what this machine is meant to have."""


def skip_without(name: str, reason: str) -> NoReturn:
    """Skip the test, or let it fail where :data:`VARIABLE` names what is missing."""
    if name in os.environ.get(VARIABLE, "").split(","):
        pytest.fail(f"{VARIABLE} names {name}, but {reason}")
    pytest.skip(reason)
