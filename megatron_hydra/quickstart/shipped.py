"""Files of the package: the tiny teacher, and its training text."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path


def shipped_teacher() -> Path:
    """The folder of the package's teacher (Hugging Face format)."""
    return Path(str(resources.files("megatron_hydra.quickstart").joinpath("shipped_teacher")))


@functools.cache
def shipped_text() -> str:
    """The package's real text (see ``shipped_teacher/NOTICE.txt``)."""
    return (shipped_teacher() / "text.txt").read_text()
