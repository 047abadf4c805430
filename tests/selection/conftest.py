"""Fixtures of the selection tests."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["qwen3", "llama", "qwen2"])
def family(request: pytest.FixtureRequest) -> str:
    """Every supported architecture."""
    return request.param
