"""The fast path gives the tokenizer's own ids; otherwise it is not used."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hydra.data import word_encoder
from megatron_hydra.data.word_encoder import WordEncoder
from megatron_hydra.errors import HydraError
from megatron_hydra.hf_loading import load_tokenizer

KINDS = ("gpt2", "qwen", "llama")
TRICKY = (
    "",
    "a",
    "it's IT'S I'LL 'Ve don't '' 's",
    "   \n\n  \t x \r\n y\r z  ",
    "12345 1,234.5 ½ ²³ Ⅷ ٣",
    "e\u0301 é \u1e9b\u0323 ﬁ ſ K ß ŉ",
    "\u00a0\u2003\u3000\u200b\ufeff\x85\x1c\x1f\x0b\x0c",
    "你好，世界。 한국어 हिन्दी עברית 🙂👨‍👩‍👧 🇩🇪",
    "\U000e0001\U0001fae8\u0378\U00020000",
    "<|endoftext|> in <|im_start|>text<s> <|unknown|>",
    "<| <|endoftext |> s>",
)


@pytest.fixture(scope="module", params=KINDS)
def encoder(request, tokenizers):
    tokenizer = load_tokenizer(tokenizers[request.param])
    return tokenizer, WordEncoder(tokenizer, np.int32)


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts(encoder, text):
    tokenizer, ours = encoder
    assert ours.fast
    wanted = np.array(tokenizer(text).input_ids, np.int32).tobytes()
    assert ours.encode(text) == wanted
    assert ours._shortcut(text) in (None, wanted)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text(tokenizers, text):
    for kind in KINDS:
        tokenizer = load_tokenizer(tokenizers[kind])
        ours = _cached(kind, tokenizer)
        assert ours.encode(text) == np.array(tokenizer(text).input_ids, np.int32).tobytes()


_encoders: dict[str, WordEncoder] = {}


def _cached(kind: str, tokenizer) -> WordEncoder:
    if kind not in _encoders:
        _encoders[kind] = WordEncoder(tokenizer, np.int32)
    return _encoders[kind]


def test_every_character_between_others(tokenizers):
    """One text for each code point in use, beside characters of the pattern's classes."""
    tokenizer = load_tokenizer(tokenizers["qwen"])
    ours = WordEncoder(tokenizer, np.int32)
    taken = 0
    for code in [*range(0, 0x3000, 3), *range(0xA000, 0xA200, 5), *range(0xFB00, 0x10000, 7)]:
        character = chr(code)
        text = f"x{character} 1{character}{character}. '{character}\n{character}"
        short = ours._shortcut(text)
        taken += short is not None
        if short is not None:
            assert short == np.array(tokenizer(text).input_ids, np.int32).tobytes(), hex(code)
    assert taken > 3000


def test_the_fast_path_is_taken_for_ordinary_text(tokenizers):
    ours = WordEncoder(load_tokenizer(tokenizers["qwen"]), np.uint16)
    for text in ("Plain prose, with 12 numbers.", "naïve “quotes” — größer", "你好"):
        assert ours._shortcut(text) is not None


def test_texts_that_need_the_tokenizer_use_it(tokenizers):
    ours = WordEncoder(load_tokenizer(tokenizers["qwen"]), np.uint16)
    for text in ("e\u0301", "a<|im_end|>b", "\u0378", unicodedata.normalize("NFD", "é")):
        assert ours._shortcut(text) is None


def test_other_tokenizers_have_no_fast_path(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "hello": 1, "world": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = WordEncoder(PreTrainedTokenizerFast(tokenizer_object=words), np.uint16)
    assert not encoder.fast
    assert np.frombuffer(encoder.encode("hello there world"), np.uint16).tolist() == [1, 0, 2]


def test_special_tokens_can_be_left_out(tokenizers):
    tokenizer = load_tokenizer(tokenizers["llama"])
    with_bos = np.frombuffer(WordEncoder(tokenizer, np.uint16).encode("hello"), np.uint16)
    without = WordEncoder(tokenizer, np.uint16, add_special_tokens=False).encode("hello")
    assert with_bos[0] == 3
    assert with_bos[1:].tobytes() == without


def test_a_disagreement_stops_the_run(tokenizers):
    ours = WordEncoder(load_tokenizer(tokenizers["qwen"]), np.uint16)
    ours._words["hello"] = b"\1\0\2\0"
    with pytest.raises(HydraError, match="run again with --exact"):
        ours.encode("hello")


def test_the_table_of_words_is_bounded(tokenizers, monkeypatch):
    monkeypatch.setattr(word_encoder, "_MAX_WORDS", 10)
    tokenizer = load_tokenizer(tokenizers["qwen"])
    ours = WordEncoder(tokenizer, np.int32)
    text = " ".join(f"word{chr(97 + i)}" for i in range(26))
    assert ours.encode(text) == np.array(tokenizer(text).input_ids, np.int32).tobytes()
    assert len(ours._words) <= 10
