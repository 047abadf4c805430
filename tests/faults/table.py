"""The table of faults: each test writes a line for its fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def table(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Adds a line to the table of ``python -m tests.faults.matrix``."""

    def line(fault: str, tried: int, good: int, outcome: str) -> None:
        for name, value in (
            ("fault", fault), ("tried", tried), ("good", good), ("outcome", outcome),
        ):  # fmt: skip
            record_property(name, value)

    return line
