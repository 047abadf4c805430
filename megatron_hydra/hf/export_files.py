"""The files of an exported model folder that let it load without this package."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

ARCHITECTURE = "HydraHeadForCausalLM"
"""The class named in an exported ``config.json`` under ``architectures``."""


def hf_export_files() -> dict[str, Path]:
    """Name in the export folder -> file to copy there, verbatim."""
    folder = Path(__file__).parent
    parts = ("cache", "configuration", "decode", "modeling", "window")
    return {name: folder / name for name in (f"{part}_hydrahead.py" for part in parts)}


def auto_map() -> dict[str, str]:
    """The ``auto_map`` of an exported ``config.json``: the file of every class."""
    return {
        "AutoConfig": "configuration_hydrahead.HydraHeadConfig",
        "AutoModel": "modeling_hydrahead.HydraHeadModel",
        "AutoModelForCausalLM": f"modeling_hydrahead.{ARCHITECTURE}",
        **{
            f"AutoModelFor{task}": f"modeling_hydrahead.HydraHeadFor{task}"
            for task in ("SequenceClassification", "TokenClassification")
        },
    }


def carries_our_code(folder: Path) -> bool:
    """Whether transformers would run only this package's own code from a model folder.

    All Python files are compared byte for byte, those in subfolders as well: transformers runs
    ``custom_generate/generate.py``. The configs may name only these files, because an ``auto_map`` can
    point to another repository.
    """
    ours = hf_export_files()
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    return (
        found.keys() == ours.keys()
        and all(filecmp.cmp(path, ours[name], shallow=False) for name, path in found.items())
        and _auto_map_in(folder / "config.json") == auto_map()
        and _auto_map_in(folder / "tokenizer_config.json") is None
    )


def _auto_map_in(path: Path) -> Any:
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return body.get("auto_map") if isinstance(body, dict) else None
