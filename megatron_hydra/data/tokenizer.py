"""HF tokenizers: encoding, end tokens and fingerprints."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_hydra.errors import HydraError

_PROBE = "Héllo,  world!\n\n\tdef f(x): return x**2  # 1234567 §¶ 你好 🙂 don't\u200b end"


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of ``text`` without special tokens at its ends."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend.encode(text, add_special_tokens=False).ids
    return tokenizer.encode(text, add_special_tokens=False)


def encode_batch(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    """Ids of many texts. It is fast because it computes no offsets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]
    return tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]


def vocabulary_size(tokenizer: Any) -> int:
    """Number of vocabulary entries, or the largest id + 1 if ids have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Storage dtype, chosen as in Megatron-LM: uint16 below 65,500 entries, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


@functools.lru_cache(maxsize=8)
def end_tokens_of(model: Any, tokenizer: Any | None) -> list[int]:
    """The end tokens of an HF model, from its generation config, or else from the tokenizer.

    Raises:
        HydraError: a value there is not a token id.
    """
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None and tokenizer is not None:
        given = tokenizer.eos_token_id
    return token_ids(given)


def token_ids(given: Any) -> list[int]:
    """The end tokens of a config: none, one or several.

    Raises:
        HydraError: the value has another type.
    """
    ends = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    if not all(isinstance(token, int) for token in ends):
        raise HydraError(
            f"the model's eos_token_id is {given!r}: it must be a token id, or a list of token ids"
        )
    return ends


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary and the ids of a probe text.

    It does not depend on the tokenizer's path or on the serialisation of a library version. It changes with
    every change of ids.
    """
    digest = hashlib.sha256()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    digest.update(json.dumps(vocabulary, ensure_ascii=True).encode())
    digest.update(json.dumps(encode(tokenizer, _PROBE)).encode())
    return digest.hexdigest()


def special_tokens_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a probe text's ids, with the special tokens that the tokenizer adds."""
    (ids,) = encode_batch(tokenizer, [_PROBE], add_special_tokens=True)
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def chat_template_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the template that turns conversations into text."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()
