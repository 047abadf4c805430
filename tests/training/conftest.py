"""One tiny teacher, student and text for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import tiny


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``teacher/``, ``student/`` and ``text``; tests write their runs elsewhere."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_all(folder)
    return folder
