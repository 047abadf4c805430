"""The quickstart's tokens: characters of real text, and 32 keys and 32 values for facts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from megatron_hydra.errors import HydraError

TEXT_CHARACTERS = " \nabcdefghijklmnopqrstuvwxyz.,\"'()-_:;"
NUM_KEYS = 32
NUM_VALUES = 32
END = "<|end|>"
UNKNOWN = "<|unknown|>"


def key_token(index: int) -> str:
    """The token of key ``index``."""
    return f"<k{index:02d}>"


def value_token(index: int) -> str:
    """The token of value ``index``."""
    return f"<v{index:02d}>"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Token ids by their role.

    Attributes:
        keys, values: ids of facts' tokens, int64.
        size: number of all tokens.
        end: id of the end-of-document token.
    """

    keys: np.ndarray
    values: np.ndarray
    size: int
    end: int

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Find the roles in a Hugging Face tokenizer.

        Raises:
            HydraError: the tokenizer has no quickstart key and value tokens.
        """
        known = tokenizer.get_vocab()
        names = [key_token(i) for i in range(NUM_KEYS)] + [
            value_token(i) for i in range(NUM_VALUES)
        ]
        missing = [name for name in (*names, END) if name not in known]
        if missing:
            raise HydraError(
                f"tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no token {missing[0]!r}:"
                " the quickstart's tasks need the tokenizer of the quickstart's teacher"
            )
        ids = np.array([known[name] for name in names], dtype=np.int64)
        return cls(ids[:NUM_KEYS], ids[NUM_KEYS:], len(tokenizer), known[END])


def build_tokenizer() -> Any:
    """A ``PreTrainedTokenizerFast``: lower-cased characters; keys and values are one token each."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )
    from transformers import PreTrainedTokenizerFast

    tokens = [END, UNKNOWN, *TEXT_CHARACTERS]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_tokens(
        [AddedToken(key_token(i), normalized=False) for i in range(NUM_KEYS)]
        + [AddedToken(value_token(i), normalized=False) for i in range(NUM_VALUES)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
