"""Fixtures of the data tests."""

from __future__ import annotations

import pytest

from tests.data.corpora import train_tokenizer


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, str]:
    """Folders of a GPT-2-like, a Qwen-like and a Llama-like tokenizer."""
    kinds = ("gpt2", "qwen", "llama")
    return {kind: train_tokenizer(tmp_path_factory.mktemp(kind), kind) for kind in kinds}


@pytest.fixture(scope="session")
def qwen(tokenizers) -> str:
    """Folder of the Qwen-like tokenizer."""
    return tokenizers["qwen"]
