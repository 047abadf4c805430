from __future__ import annotations

import pytest

from megatron_hydra.hf_loading import find_tokenizer
from megatron_hydra.quickstart.shipped import shipped_teacher
from megatron_hydra.quickstart.tasks import TaskGenerator


@pytest.fixture(scope="session")
def tokenizer():
    return find_tokenizer(shipped_teacher())


@pytest.fixture(scope="session")
def tasks(tokenizer):
    return TaskGenerator.of(tokenizer)
