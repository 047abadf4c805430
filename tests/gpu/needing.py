"""Requirements that a test of the GPU suite declares."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

Test = TypeVar("Test", bound=Callable)


def needs(*jobs: str) -> Callable[[Test], Test]:
    """Mark a test ``gpu`` and ``slow``, and name the jobs of :mod:`tests.gpu.chain` that it needs."""

    def mark(test: Test) -> Test:
        test.gpu_jobs = jobs  # type: ignore[attr-defined]
        return pytest.mark.gpu(pytest.mark.slow(test))

    return mark
