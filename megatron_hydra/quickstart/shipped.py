"""The files that come with the package: the tiny teacher, and the text that it was trained on."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path


def shipped_teacher() -> Path:
    """The folder of the teacher that comes with the package (Hugging Face format)."""
    return Path(str(resources.files("megatron_hydra.quickstart").joinpath("shipped_teacher")))


@functools.cache
def shipped_text() -> str:
    """The real text that comes with the package (see ``shipped_teacher/NOTICE.txt``)."""
    return (shipped_teacher() / "text.txt").read_text()
