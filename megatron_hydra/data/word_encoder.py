"""Encode text to token ids several times faster than the tokenizer itself, with the same ids.

A byte-level BPE tokenizer (GPT-2, Llama 3, Qwen …) first splits text into words by a regular expression and
then encodes every word separately. This module does both steps: the ``regex`` module splits the text, and a
table gives the ids of known words. The tokenizer's own model fills the table. The bytes of the ids are joined
directly, without Python integers.

The fast path is used only if it provably gives the same ids. The tokenizer must be of this kind. The text must
contain no added token, need no normalisation, and have no character that the two regular expression engines
(or their Unicode versions) treat differently. We find these characters by testing every code point with both
engines. The tokenizer encodes all other texts. It also encodes a sample of the fast texts as a check.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import regex

from megatron_hydra.data.tokenizer import encode_batch
from megatron_hydra.errors import HydraError

_MAX_WORDS = 1 << 19
"""Maximum number of words in the table, about 200 bytes each. Every process has its own table."""
_LONGEST_WORD = 64
"""Maximum length of a word in the table. Longer words rarely repeat."""
_CHECK_EVERY = 512
_LAST_CODE = 0x1FFFF  # rarer characters use the slow path
_PROBES = (
    "",
    " ",
    "Hello, world! It's 12345 o'clock; don't WE'LL they'VE.",
    "  two  spaces\n\n\n and\tlines \r\n end   ",
    "Größe naïve déjà 你好,世界 🙂👩‍👩‍👧 ١٢٣ ½ ⅷ a\u0301 \u00a0\u2003\u200b\ufeff",
    "def f(x):\n\treturn x**2  # 3.14159 == pi?\n",
)
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class _Words(dict[str, bytes]):
    """word → bytes of its ids; filled on demand by the tokenizer's model."""

    def __init__(self, model: Any, dtype: type[np.generic]) -> None:
        super().__init__()
        self._model = model
        self._dtype = dtype
        self._alphabet = _byte_alphabet()

    def __missing__(self, word: str) -> bytes:
        mapped = word.encode("utf-8").decode("latin-1").translate(self._alphabet)
        ids = [token.id for token in self._model.tokenize(mapped)]
        encoded = np.array(ids, dtype=self._dtype).tobytes()
        if len(word) > _LONGEST_WORD:
            return encoded
        if len(self) >= _MAX_WORDS:
            self.clear()
        self[word] = encoded
        return encoded


class WordEncoder:
    """Encodes documents to the bytes of a ``.bin`` file.

    Attributes:
        fast: whether this tokenizer supports the fast path.
    """

    def __init__(
        self,
        tokenizer: Any,
        dtype: type[np.generic],
        *,
        add_special_tokens: bool = True,
        fast: bool = True,
    ) -> None:
        """Prepare the encoder.

        Args:
            tokenizer: an HF tokenizer.
            dtype: storage type of an id.
            add_special_tokens: as in HF's ``tokenizer(text)``.
            fast: allow the fast path.
        """
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._special = add_special_tokens
        self._seen = 0
        pattern = _word_pattern(tokenizer) if fast else None
        self.fast = pattern is not None
        if pattern is None:
            return
        self._normalizes, source = pattern
        self._split: Callable[[str], list[str]] = regex.compile(source).findall
        self._unsafe = re.compile(_character_class(_unsafe_characters(source)))
        self._words = _Words(tokenizer.backend_tokenizer.model, dtype)
        self._added = sorted(
            {
                token.content
                for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
            }
        )
        self._added_starts = sorted({content[:2] for content in self._added})
        self._prefix, self._suffix = self._special_bytes()
        self.fast = all(self._shortcut(p) in (None, self._exact(p)) for p in _PROBES)

    def room_for_words(self) -> int:
        """Number of bytes by which the table may still grow, if new words are like those in it."""
        if not self.fast or not self._words:
            return 0
        some = list(itertools.islice(self._words.items(), _CHECK_EVERY))
        entry = sum(sys.getsizeof(word) + sys.getsizeof(ids) for word, ids in some) / len(some)
        full = dict.fromkeys(range(len(some)))
        entry += sys.getsizeof(full) / len(full)
        return round((_MAX_WORDS - len(self._words)) * entry)

    def encode(self, text: str) -> bytes:
        """Ids of one document, as bytes of ``dtype``.

        Raises:
            UnicodeEncodeError: the text holds lone surrogates.
            HydraError: the fast path and the tokenizer disagree (a bug; the message says how to continue
                without the fast path).
        """
        encoded = self._shortcut(text) if self.fast else None
        if encoded is None:
            return self._exact(text)
        self._seen += 1
        if self._seen % _CHECK_EVERY == 1 and encoded != self._exact(text):
            raise HydraError(
                "the fast path and the tokenizer disagree on a text that starts with "
                f"{text[:60]!r}; run again with --exact, and please report it"
            )
        return encoded

    def _exact(self, text: str) -> bytes:
        try:
            (ids,) = encode_batch(self._tokenizer, [text], self._special)
        except TypeError:
            text.encode("utf-8")  # the tokenizer cannot encode a lone surrogate
            raise
        return np.array(ids, dtype=self._dtype).tobytes()

    def _shortcut(self, text: str) -> bytes | None:
        """Ids by the table of words; ``None`` if the tokenizer must encode the text."""
        if not text.isascii() and (
            self._unsafe.search(text) is not None
            or (self._normalizes and not unicodedata.is_normalized("NFC", text))
        ):
            return None
        if any(start in text for start in self._added_starts) and any(
            content in text for content in self._added
        ):
            return None
        words = self._split(text)
        if sum(map(len, words)) != len(text):
            return None
        body = b"".join(map(self._words.__getitem__, words))
        return self._prefix + body + self._suffix

    def _special_bytes(self) -> tuple[bytes, bytes]:
        """Bytes of the tokens that the post-processor adds before and after a document."""
        if not self._special:
            return b"", b""
        bare, full = (encode_batch(self._tokenizer, ["a"], flag)[0] for flag in (False, True))
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        parts = full[:at], full[at + len(bare) :]
        prefix, suffix = (np.array(part, dtype=self._dtype).tobytes() for part in parts)
        return prefix, suffix


def _word_pattern(tokenizer: Any) -> tuple[bool, str] | None:
    """(normalises to NFC, regular expression) of a byte-level BPE tokenizer; else ``None``."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    description = json.loads(backend.to_str())
    model, normalizer = description["model"], description.get("normalizer")
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        return None
    if (
        model.get("end_of_word_suffix")
        or description.get("truncation")
        or description.get("padding")
    ):
        return None
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return None
    source = _split_pattern(description.get("pre_tokenizer") or {})
    if source is None:
        return None
    try:
        compiled = regex.compile(source)
    except regex.error:
        return None
    return (normalizer is not None, source) if compiled.groups == 0 else None


def _split_pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """The regular expression of the two common byte-level pre-tokenizers."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    last = parts[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(parts) == 1:
        return _GPT2_PATTERN if last.get("use_regex", True) else None
    first = parts[0]
    plain_split = (
        len(parts) == 2
        and first.get("type") == "Split"
        and first.get("behavior") == "Isolated"
        and not first.get("invert")
        and not last.get("use_regex", True)
        and "Regex" in first.get("pattern", {})
    )
    return first["pattern"]["Regex"] if plain_split else None


def _byte_alphabet() -> dict[int, int]:
    """Byte-level BPE's bijection from bytes to printable characters, as a translation table."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: 256 + i for i, byte in enumerate(others)}


@functools.lru_cache(maxsize=2)
def _unsafe_characters(source: str) -> tuple[tuple[int, int], ...]:
    """Inclusive ranges of code points on which the two engines may differ.

    These are characters that this Python's Unicode version does not assign, surrogates, characters that
    case-fold to ASCII letters (the pattern may ignore case), and characters for which a character class of the
    pattern gives different results in the two engines.
    """
    unsafe = np.zeros(sys.maxunicode + 1, dtype=bool)
    unsafe[0xD800:0xE000] = True
    unsafe[_LAST_CODE + 1 :] = True
    codes = np.array([*range(0xD800), *range(0xE000, _LAST_CODE + 1)])
    everything = "".join(map(chr, codes.tolist()))
    unsafe[codes] = [kind == "Cn" for kind in map(unicodedata.category, everything)]
    for character in filter(_folds_to_ascii(source.lower()), everything[128:]):
        unsafe[ord(character)] = True
    for name in sorted(set(re.findall(r"\\[pP]\{\^?\w+\}|\\[sSdDwWhH]", source))):
        unsafe[codes[_members_python(name, everything) != _members_rust(name, everything)]] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[0], unsafe.view(np.int8), [0]])))
    return tuple((int(a), int(b) - 1) for a, b in edges.reshape(-1, 2))


def _folds_to_ascii(pattern: str) -> Callable[[str], bool]:
    """Whether a character equals, ignoring case, an ASCII letter or letters of the pattern."""

    def folds(character: str) -> bool:
        folded = character.casefold()
        if folded == character and character.lower() == character:
            return False
        forms = {folded, character.lower()}
        return any(f.isascii() and (len(f) == 1 or f in pattern) for f in forms)

    return folds


def _members_python(name: str, text: str) -> np.ndarray:
    members = np.zeros(len(text), dtype=bool)
    for match in regex.finditer(f"{name}+", text):
        members[match.start() : match.end()] = True
    return members


def _members_rust(name: str, text: str) -> np.ndarray:
    from tokenizers import Regex, pre_tokenizers

    members = np.ones(len(text), dtype=bool)
    gaps = pre_tokenizers.Split(Regex(f"{name}+"), "removed").pre_tokenize_str(text)
    for _, (start, end) in gaps:
        members[start:end] = False
    return members


def _character_class(ranges: tuple[tuple[int, int], ...]) -> str:
    return "[" + "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in ranges) + "]"
