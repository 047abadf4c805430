"""Files that are copied with the weights, from the source to the checkpoint to the export."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""The files of a tokenizer and of generation."""

NAMED_TEMPLATES = "additional_chat_templates/*.jinja"
"""Named chat templates, such as ``tool_use``; they are copied as well."""


def copy_tokenizer_files(
    source: str | os.PathLike[str], target: str | os.PathLike[str]
) -> list[str]:
    """Copy the :data:`TOKENIZER_FILES` and :data:`NAMED_TEMPLATES` of ``source``. Return their names."""
    names = tokenizer_files(Path(source))
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in names:
        (Path(target) / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return names


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the tokenizer files in a folder."""
    templates = [path for path in sorted(folder.glob(NAMED_TEMPLATES)) if path.is_file()]
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return names + [path.relative_to(folder).as_posix() for path in templates]
