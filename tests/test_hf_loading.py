"""Which files of a Hub model are fetched. The Hub's client is a fake, because tests have no network."""

from __future__ import annotations

import json

import huggingface_hub
import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.hf_loading import checked_folder, find_tokenizer, load_tokenizer
from megatron_hydra.quickstart.shipped import shipped_teacher


@pytest.fixture
def tokenizer():
    return find_tokenizer(shipped_teacher())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake client; returns its calls. The snapshot is a model with its own code."""
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
    """A tokenizer without a model beside it, as in a checkpoint's folder."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = find_tokenizer(tmp_path / "tokenizer")
    assert found("abc")["input_ids"] == tokenizer("abc")["input_ids"]


def test_no_weights_are_fetched_for_a_tokenizer(hub):
    with pytest.raises(HydraError, match="owner/name has no tokenizer"):
        load_tokenizer("owner/name")
    ((_, _, patterns),) = hub
    assert "*.json" in patterns and "*.safetensors" not in patterns


def test_whether_a_folder_has_a_tokenizer_is_one_rule(tmp_path):
    """The files decide: without files there is no tokenizer; files that fail to load are an error."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(HydraError, match=r"the tokenizer in .* cannot be loaded"):
        find_tokenizer(tmp_path)


def test_only_code_of_the_tokenizer_itself_needs_trust(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "code.C"}}))
    assert find_tokenizer(tmp_path)("abc")["input_ids"] == tokenizer("abc")["input_ids"]
    path.write_text(
        json.dumps({"model_type": "x", "auto_map": {"AutoTokenizer": ["code.T", None]}})
    )
    with pytest.raises(HydraError, match="--trust-remote-code"):
        find_tokenizer(tmp_path)
