"""Merging accepts only undamaged inputs of one kind."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_hydra.data.manifest import Manifest
from megatron_hydra.data.merging import find_shards, merge
from megatron_hydra.errors import HydraError
from tests.data.corpora import write_jsonl
from tests.data.test_tokenization import config, run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", 100)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"unit_bytes": 4_000}, "shard.units"),
        ({"append_eod": False}, "append_eod"),
        ({"eod_token": "<|im_end|>"}, "tokenizer.eod_id"),
        ({"max_tokens": 10**6}, "max_tokens"),
    ],
)
def test_shards_that_do_not_fit_are_named(corpus, qwen, tmp_path, options, key):
    output = tmp_path / "s"
    run(config(corpus, output, qwen, unit_bytes=9_000, shard=(0, 2)))
    run(config(corpus, output, qwen, **{"unit_bytes": 9_000, "shard": (1, 2), **options}))
    with pytest.raises(
        HydraError, match=rf"s-00001-of-00002\.json: {re.escape(key)} is .* requires"
    ):
        merge(find_shards(str(output)), str(output), shards=True)
    assert not list(tmp_path.glob("s.*"))
    merged = merge(find_shards(str(output)), str(output))
    assert len(merged.source["merged"]) == 2  # not recorded as the whole corpus


def test_shards_of_another_corpus_are_named(corpus, qwen, tmp_path):
    output = tmp_path / "s"
    other = write_jsonl(tmp_path / "corpus.jsonl", 100, seed=1)
    for index, source in enumerate((corpus, other)):
        run(config(source, output, qwen, unit_bytes=9_000, shard=(index, 2)))
    with pytest.raises(HydraError, match=r"s-00001-of-00002\.json: inputs is"):
        merge(find_shards(str(output)), str(output), shards=True)


def test_a_damaged_index_is_named(corpus, qwen, tmp_path):
    run(config(corpus, tmp_path / "a", qwen))
    path = tmp_path / "a.json"
    manifest = Manifest.load(path)
    dataclasses.replace(manifest, idx=dataclasses.replace(manifest.idx, sha256="0" * 64)).save(path)
    with pytest.raises(HydraError, match=r"the SHA-256 of .*a\.idx differs"):
        merge([str(tmp_path / "a")], str(tmp_path / "m"))
    assert not list(tmp_path.glob("m*"))
