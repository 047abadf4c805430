"""What an exported model folder carries so that it loads without this package."""

from __future__ import annotations

from pathlib import Path

ARCHITECTURE = "HydraHeadForCausalLM"
"""The class named in an exported ``config.json`` under ``architectures``."""


def hf_export_files() -> dict[str, Path]:
    """Name in the export folder -> file to copy there, verbatim."""
    folder = Path(__file__).parent
    parts = ("configuration", "modeling", "window")
    return {name: folder / name for name in (f"{part}_hydrahead.py" for part in parts)}


def auto_map() -> dict[str, str]:
    """The ``auto_map`` of an exported ``config.json``: which class in which file."""
    return {
        "AutoConfig": "configuration_hydrahead.HydraHeadConfig",
        "AutoModel": "modeling_hydrahead.HydraHeadModel",
        "AutoModelForCausalLM": f"modeling_hydrahead.{ARCHITECTURE}",
    }
