"""An export is tested as its users run it: without Megatron-Core."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def exports_may_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, Megatron-Core's platform switches ``torch.compile`` off for its whole process.

    A test of another folder may have installed it, or only its import.
    """
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
