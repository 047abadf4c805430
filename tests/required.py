"""Tests that need special equipment are skipped without it, unless the machine declares to have it."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

VARIABLE = "HYDRA_REQUIRE"
"""Environment variable: comma-separated names of the equipment that this machine should have."""


def skip_without(name: str, reason: str) -> NoReturn:
    """Skip the test, or fail it if :data:`VARIABLE` names the missing equipment."""
    if name in os.environ.get(VARIABLE, "").split(","):
        pytest.fail(f"{VARIABLE} names {name}, but {reason}")
    pytest.skip(reason)
