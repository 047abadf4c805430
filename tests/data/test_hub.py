"""Hub data sets: the commit is looked up once; reading, recording and resuming use it."""

from __future__ import annotations

import types

import pytest
from datasets import Dataset

from megatron_hydra.data import hub
from megatron_hydra.data.corpus import CorpusConfig, input_identity
from megatron_hydra.errors import HydraError


@pytest.fixture
def loads(monkeypatch) -> list[dict]:
    """A fake Hub with one data set; returns the arguments of every ``load_dataset``."""
    import datasets
    import huggingface_hub

    def info(self, name, revision=None, timeout=None):
        if name != "known/set":
            raise OSError("not reachable\nand more")
        return types.SimpleNamespace(sha=f"commit-of-{revision}")

    calls: list[dict] = []

    def load(name, config, **options):
        calls.append({"name": name, **options})
        return Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    hub.load_hub.cache_clear()
    yield calls
    hub.load_hub.cache_clear()


def test_the_commit_is_read_and_recorded(loads):
    corpus = CorpusConfig(("known/set",), hub=True, revision="main")
    pinned = hub.pin_revisions(corpus, lambda _: None)
    assert input_identity(pinned)[0]["revision"] == "commit-of-main"
    hub.load_hub(pinned, "known/set", True)
    hub.load_hub(pinned, "known/set", True)
    assert [call["revision"] for call in loads] == ["commit-of-main"]


def test_an_unknown_commit_is_reported(loads):
    lines: list[str] = []
    corpus = CorpusConfig(("far/away",), hub=True, revision="v1")
    pinned = hub.pin_revisions(corpus, lines.append)
    assert input_identity(pinned)[0]["revision"] == "v1"
    assert lines == ["far/away: its commit is not known (not reachable); recorded as revision v1"]


def test_folders_and_files_are_left_alone(loads, tmp_path):
    local = CorpusConfig((str(tmp_path),), hub=True)
    assert hub.pin_revisions(local, pytest.fail).commits == (None,)
    files = CorpusConfig(("a.jsonl",))
    assert hub.pin_revisions(files, pytest.fail) is files


def test_a_data_set_that_cannot_be_loaded_is_named(monkeypatch):
    # Both libraries read the variable at their import; without a network they would try for half a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    corpus = CorpusConfig(("no/such-set",), hub=True)
    with pytest.raises(HydraError, match="--dataset no/such-set: cannot load it"):
        hub.load_hub(corpus, "no/such-set", False)
