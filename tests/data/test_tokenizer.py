"""Tokenizers: they encode whole documents; a fingerprint covers everything that decides the ids."""

from __future__ import annotations

import json
import shutil
import types

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from megatron_hydra.data.tokenizer import (
    chat_template_fingerprint,
    encode,
    encode_batch,
    special_tokens_fingerprint,
    vocabulary_size,
)
from megatron_hydra.errors import HydraError
from megatron_hydra.hf_loading import find_tokenizer, load_tokenizer


@pytest.mark.parametrize("as_file", [False, True])
def test_documents_are_not_cut_or_padded_whatever_the_tokenizer_asks_for(qwen, tmp_path, as_file):
    backend = Tokenizer.from_file(f"{qwen}/tokenizer.json")
    backend.enable_truncation(8)
    backend.enable_padding(length=16)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    name = str(tmp_path / "tokenizer.json") if as_file else str(tmp_path)
    texts = ["one", "the of and a to in is you that it " * 3]
    whole = load_tokenizer(qwen)
    tokenizer = load_tokenizer(name)
    assert encode_batch(tokenizer, texts, True) == encode_batch(whole, texts, True)
    assert [encode(tokenizer, text) for text in texts] == [encode(whole, text) for text in texts]


@pytest.mark.parametrize("load", [load_tokenizer, find_tokenizer])
def test_settings_that_do_not_work_are_refused_with_the_folder(load, qwen, tmp_path):
    shutil.copytree(qwen, tmp_path / "damaged")
    path = tmp_path / "damaged" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": [1]}))
    with pytest.raises(HydraError, match="damaged"):
        load(str(tmp_path / "damaged"))


def test_special_tokens_and_templates_have_fingerprints_of_their_own(qwen, tokenizers):
    tokenizer, other = load_tokenizer(qwen), load_tokenizer(tokenizers["llama"])
    assert special_tokens_fingerprint(tokenizer) != special_tokens_fingerprint(other)
    assert chat_template_fingerprint(tokenizer) == chat_template_fingerprint(other)
    changed = types.SimpleNamespace(chat_template=tokenizer.chat_template + " ")
    assert chat_template_fingerprint(changed) != chat_template_fingerprint(tokenizer)


def test_ids_beyond_the_length_of_the_vocabulary_count(qwen):
    tokenizer = load_tokenizer(qwen)
    assert vocabulary_size(tokenizer) == len(tokenizer)

    class Gap:
        def __len__(self):
            return 2

        def get_vocab(self):
            return {"a": 0, "b": 70_000}

    assert vocabulary_size(Gap()) == 70_001
