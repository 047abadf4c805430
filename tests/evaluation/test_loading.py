"""What of a Hub model is fetched; there is no network here, so the Hub's client is a stand-in."""

from __future__ import annotations

import json

import huggingface_hub
import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.loading import checked_folder, load_tokenizer


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The calls that were made; the snapshot is a model with code of its own."""
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "code.C"}}))
    calls = []

    def snapshot_download(name, revision, allow_patterns, **_):
        calls.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_code_is_fetched_only_where_it_is_trusted(hub, tmp_path):
    assert checked_folder("owner/name", True, "v1") == tmp_path
    with pytest.raises(HydraError, match="--trust-remote-code"):
        checked_folder("owner/name", False)
    (_, trusted_revision, trusted), (_, revision, safe) = hub
    assert (trusted_revision, revision) == ("v1", None)
    assert set(trusted) - set(safe) == {"*.py", "*.tiktoken"}
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".pkl")) for pattern in safe)


def test_a_tokenizer_may_stand_alone(tokenizer, tmp_path):
    """As in a checkpoint's folder: without a model beside it."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = load_tokenizer(tmp_path / "tokenizer")
    assert found("abc")["input_ids"] == tokenizer("abc")["input_ids"]
