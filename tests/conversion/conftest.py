"""Folders that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.models import VARIANTS, make_head_map, make_hf


@pytest.fixture(scope="session")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face folder for each variant; tests must not write there."""
    root = tmp_path_factory.mktemp("hf")
    return {variant: make_hf(root / variant, variant) for variant in VARIANTS}


@pytest.fixture(scope="session")
def head_map(hf_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head map for ``qwen3-tied``."""
    return make_head_map(tmp_path_factory.mktemp("maps") / "map.json", hf_folders["qwen3-tied"])


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration tokens for models without a tokenizer."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.jsonl"
    path.write_text('{"tokens": [' + ", ".join(str(7 * i % 61) for i in range(200)) + "]}\n")
    return path
