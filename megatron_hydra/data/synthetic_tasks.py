"""The built-in long-context tasks, for any HF tokenizer and any length with room for the question.

They follow the families of RULER (Hsieh et al. 2024, arXiv 2404.06654): retrieval of one or many keys,
tracking of variables, and extraction of the most frequent words. We wrote other sentences and filler, so
training does not see the text of the evaluation. Each document has filler with facts, a question, and the
answer. With ``loss="answer"`` (the default) only the answer and the end token are trainable. With
``loss="all"`` every token is trainable.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from megatron_hydra.data.document import Document
from megatron_hydra.data.synthetic_registry import synthetic_task
from megatron_hydra.data.tokenizer import encode
from megatron_hydra.errors import HydraError

Loss = Literal["answer", "all"]
Value = Literal["number", "word"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ADJECTIVES = _words(
    """
    amber ancient arctic autumn blue brave bright broken calm clever cold copper crimson
    curious dark distant dusty early eager empty faint fierce frozen gentle golden green
    grey happy hidden hollow humble icy idle iron jolly keen late lively lonely lucky mellow
    misty modest narrow noble odd old pale patient plain proud purple quick quiet rapid rare
    red restless rough royal rusty salty scarlet secret shy silent silver simple sleepy slow
    small smooth snowy soft solid spare steady steep stern still stormy strange sturdy sunny
    swift tall tame tender thin tidy tiny vast velvet violet warm weary white wide wild
    windy wise wooden yellow young
    """
)
_NOUNS = _words(
    """
    acorn anchor apple arrow badger barrel basket beacon beetle bell bench birch blanket
    boat book bottle branch bridge brook bucket butter button cabin camel candle canyon
    castle cedar chair cherry clock cloud coin comet compass copper coral cradle crane
    cricket crow crystal curtain dagger desert dolphin door dragon drum eagle ember engine
    falcon feather fern ferry field finch flute forest fountain fox garden gate ginger
    glacier glove goose granite hammer harbor hazel hedge helmet heron hill honey horse
    island ivory jacket jewel kettle kite ladder lagoon lamp lantern lemon lily lion lizard
    loom lynx mango maple marble market meadow mill mirror moon moss mountain needle nest
    oak ocean olive orchard otter owl oyster paddle palace panther paper pearl pebble pepper
    piano pigeon pillow planet plum pocket pond poplar quarry quill rabbit raven reed ribbon
    river robin rocket rope saddle sail salmon scarf seal shell shore silk spider spoon
    spruce stable star stone stork stream swan table temple thistle thread tiger timber
    torch tower trout tulip tunnel turtle valley vessel village violin wagon walnut whale
    wheat wheel willow window wolf wren
    """
)
_FILLER = (
    "The morning train left the station a few minutes late.",
    "Rain had fallen all night and the streets were still wet.",
    "She put the letters on the table and opened the window.",
    "Nobody in the office remembered who had ordered the chairs.",
    "The old path follows the river for about two miles.",
    "He read the report twice before he closed the door.",
    "In winter the lake freezes and the boats stay ashore.",
    "The market opens early on Saturdays and closes at noon.",
    "A light breeze moved the curtains while they talked.",
    "Most visitors turn back when they reach the second bridge.",
    "The bread was warm, and the kitchen smelled of cinnamon.",
    "They had planned to leave at dawn, but the road was closed.",
    "Several shelves in the library had been empty for years.",
    "The teacher wrote the date on the board and sat down.",
    "Far below, the harbour lights came on one after another.",
    "It takes patience to repair a clock of that size.",
    "The dog slept under the bench until the shop closed.",
    "Every spring the council paints the benches in the park.",
    "A narrow stair leads from the cellar to the courtyard.",
    "The choir practises on Thursdays in the small hall.",
    "From the hill one can see the whole length of the valley.",
    "He folded the map carefully and put it in his coat.",
    "The museum keeps its oldest coins in a locked drawer.",
    "After lunch the children went to look for shells.",
    "The engine made a strange sound and then fell silent.",
    "Grass had grown between the stones of the yard.",
    "The baker's son delivers the papers before school.",
    "Her brother keeps bees behind the wooden fence.",
    "The meeting lasted longer than anyone had expected.",
    "A thin layer of dust covered the piano.",
    "The ferry runs every hour until the end of September.",
    "Somebody had left an umbrella on the last seat.",
)


@dataclasses.dataclass(frozen=True)
class _Bank:
    """Filler sentences and invented words, tokenised once per tokenizer."""

    sentences: tuple[np.ndarray, ...]
    words: tuple[str, ...]
    word_tokens: tuple[np.ndarray, ...]


@functools.lru_cache(maxsize=4)
def _bank(tokenizer: Any) -> _Bank:
    syllables = [c + v for c in "bdfghklmnprstvz" for v in ("a", "e", "i", "o", "u")]
    rng = np.random.Generator(np.random.Philox(key=np.array([0x5EED, 0], dtype=np.uint64)))
    picks = rng.integers(len(syllables), size=(4096, 3))
    words = tuple(dict.fromkeys("".join(syllables[s] for s in row) for row in picks))
    return _Bank(
        tuple(_tokens(tokenizer, " " + sentence) for sentence in _FILLER),
        words,
        tuple(_tokens(tokenizer, " " + word) for word in words),
    )


def _tokens(tokenizer: Any, text: str) -> np.ndarray:
    if tokenizer is None:
        raise HydraError(
            "data.tokenizer is empty: the built-in synthetic tasks generate text and need an HF "
            "tokenizer"
        )
    return np.array(encode(tokenizer, text), dtype=np.int64)


def _filler(rng: np.random.Generator, tokenizer: Any, tokens: int) -> list[np.ndarray]:
    """Random sentences of exactly ``tokens`` tokens; the last sentence may be cut."""
    sentences = _bank(tokenizer).sentences
    lengths = np.array([len(sentence) for sentence in sentences])
    picks = rng.integers(len(sentences), size=tokens // int(lengths.min()) + 1)
    ends = np.cumsum(lengths[picks])
    used = int(np.searchsorted(ends, tokens)) + 1 if tokens else 0
    chosen = [sentences[pick] for pick in picks[:used]]
    if chosen:
        chosen[-1] = chosen[-1][: len(chosen[-1]) - (int(ends[used - 1]) - tokens)]
    return chosen


def _scatter(
    rng: np.random.Generator, filler: list[np.ndarray], facts: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Insert facts, in their order, between filler sentences at random depths."""
    slots = np.sort(rng.integers(len(filler) + 1, size=len(facts)))
    mixed: list[np.ndarray] = []
    begin = 0
    for slot, fact in zip(slots.tolist(), facts, strict=True):
        mixed += filler[begin:slot]
        mixed.append(fact)
        begin = slot
    return mixed + filler[begin:]


def _document(
    tokenizer: Any, context: Sequence[np.ndarray], answer: np.ndarray, loss: Loss
) -> list[Document]:
    """Context, answer and end token as one document."""
    eos = getattr(tokenizer, "eos_token_id", None)
    tail = answer if eos is None else np.append(answer, eos)
    tokens = np.concatenate([*context, tail])
    if loss not in ("answer", "all"):
        raise HydraError(f"synthetic option loss is {loss!r}: it must be answer or all")
    trainable = np.full(len(tokens), loss == "all")
    trainable[len(tokens) - len(tail) :] = True
    return [Document(tokens, trainable)]


def _room(length: int, task: str, parts: Sequence[np.ndarray], tokenizer: Any) -> int:
    """Number of tokens left for filler after ``parts`` and an end token."""
    needed = sum(len(part) for part in parts) + int(
        getattr(tokenizer, "eos_token_id", None) is not None
    )
    if needed > length:
        raise HydraError(
            f"synthetic task {task}: its facts and question need {needed} tokens, but only {length} are "
            "available; use a greater length or fewer facts"
        )
    return length - needed


def _values(rng: np.random.Generator, count: int, kind: Value) -> list[str]:
    if kind == "number":
        return [str(v) for v in rng.integers(1_000_000, 10_000_000, size=count)]
    if kind == "word":
        return _keys(rng, count)
    raise HydraError(f"synthetic option value is {kind!r}: it must be number or word")


def _keys(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct adjective-noun pairs; numbers are added after all pairs are used."""
    pairs = len(_ADJECTIVES) * len(_NOUNS)
    picks = rng.permutation(pairs)[:count].tolist()
    names = [f"{_ADJECTIVES[p // len(_NOUNS)]}-{_NOUNS[p % len(_NOUNS)]}" for p in picks]
    return names + [f"{names[i % pairs]}-{i // pairs + 1}" for i in range(pairs, count)]


@synthetic_task("needles")
def needles(
    rng: np.random.Generator,
    length: int,
    tokenizer: Any,
    *,
    num_needles: int = 1,
    num_queries: int = 1,
    value: Value = "number",
    loss: Loss = "answer",
) -> list[Document]:
    """Facts "the special number of KEY is VALUE" in filler; the question names keys.

    Args:
        num_needles: number of facts in the text.
        num_queries: number of keys in the question, at most ``num_needles``.
        value: ``number`` (7 digits) or ``word``.
        loss: ``answer`` or ``all``.
    """
    if not 1 <= num_queries <= num_needles:
        raise HydraError(
            f"synthetic task needles: num_queries {num_queries} must be 1..num_needles "
            f"({num_needles})"
        )
    keys, values = _keys(rng, num_needles), _values(rng, num_needles, value)
    facts = [
        _tokens(tokenizer, f" The special {value} of {key} is {answer}.")
        for key, answer in zip(keys, values, strict=True)
    ]
    asked = rng.permutation(num_needles)[:num_queries].tolist()
    intro = _tokens(tokenizer, f"Some special {value}s are hidden in this text. Remember them.")
    what = ", ".join(keys[a] for a in asked)
    question = _tokens(tokenizer, f"\nQuestion: what is the special {value} of {what}?\nAnswer:")
    answer = _tokens(tokenizer, " " + ", ".join(values[a] for a in asked))
    room = _room(length, "needles", [intro, *facts, question, answer], tokenizer)
    body = _scatter(rng, _filler(rng, tokenizer, room), facts)
    return _document(tokenizer, [intro, *body, question], answer, loss)


@synthetic_task("multi_key")
def multi_key(
    rng: np.random.Generator,
    length: int,
    tokenizer: Any,
    *,
    num_keys: int | None = 8,
    num_queries: int = 1,
    value: Value = "number",
    loss: Loss = "answer",
) -> list[Document]:
    """Needles with distractors: many keys in the text, few in the question.

    Args:
        num_keys: number of facts in the text; ``None`` fills the text with facts instead of filler.
        num_queries: number of keys in the question.
        value, loss: as for ``needles``.
    """
    if num_keys is None:
        sample = f" The special {value} of autumn-mountain is {_values(rng, 1, value)[0]}."
        num_keys = max(num_queries, int(0.8 * length / len(_tokens(tokenizer, sample))) - 6)
    return needles(
        rng,
        length,
        tokenizer,
        num_needles=num_keys,
        num_queries=num_queries,
        value=value,
        loss=loss,
    )


@synthetic_task("variable_tracking")
def variable_tracking(
    rng: np.random.Generator,
    length: int,
    tokenizer: Any,
    *,
    num_chains: int = 2,
    num_hops: int = 4,
    loss: Loss = "answer",
) -> list[Document]:
    """Chains of assignments in filler; the answer lists all variables with a given value.

    Args:
        num_chains: number of independent chains, each with its own value; the question is about one.
        num_hops: number of copies after the first assignment of a chain.
        loss: ``answer`` or ``all``.
    """
    if num_chains < 1 or num_hops < 0:
        raise HydraError("synthetic task variable_tracking: num_chains >= 1 and num_hops >= 0")
    per_chain = num_hops + 1
    if num_chains * per_chain > 26**3:
        raise HydraError(f"synthetic task variable_tracking: at most {26**3} variables")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    picks = rng.permutation(26**3)[: num_chains * per_chain].tolist()
    names = [letters[p // 676] + letters[p // 26 % 26] + letters[p % 26] for p in picks]
    values = [str(v) for v in rng.permutation(90_000)[:num_chains] + 10_000]
    chains: list[list[str]] = []
    for chain, start in zip(values, range(0, len(names), per_chain), strict=True):
        own = names[start : start + per_chain]
        copies = [f" Set {b} = {a}." for a, b in zip(own, own[1:], strict=False)]
        chains.append([f" Set {own[0]} = {chain}.", *copies])
    turns = rng.permutation(np.repeat(np.arange(num_chains), per_chain)).tolist()
    queues = [iter(chain) for chain in chains]
    facts = [_tokens(tokenizer, next(queues[turn])) for turn in turns]
    target = int(rng.integers(num_chains))
    intro = _tokens(tokenizer, "Follow the assignments of variables that are hidden in this text.")
    question = _tokens(tokenizer, f"\nQuestion: which variables hold {values[target]}?\nAnswer:")
    answer = _tokens(
        tokenizer, " " + ", ".join(names[target * per_chain : (target + 1) * per_chain])
    )
    room = _room(length, "variable_tracking", [intro, *facts, question, answer], tokenizer)
    body = _scatter(rng, _filler(rng, tokenizer, room), facts)
    return _document(tokenizer, [intro, *body, question], answer, loss)


@synthetic_task("word_extraction")
def word_extraction(
    rng: np.random.Generator,
    length: int,
    tokenizer: Any,
    *,
    num_words: int = 3,
    ratio: int = 4,
    loss: Loss = "answer",
) -> list[Document]:
    """A long list of words; a few words are ``ratio`` times as frequent, and the answer lists them.

    Args:
        num_words: number of frequent words.
        ratio: their frequency relative to any other word.
        loss: ``answer`` or ``all``.
    """
    bank = _bank(tokenizer)
    if num_words < 1 or ratio < 2:
        raise HydraError("synthetic task word_extraction: num_words >= 1 and ratio >= 2")
    shuffled = rng.permutation(len(bank.words))
    common, others = shuffled[:num_words], shuffled[num_words:]
    intro = _tokens(tokenizer, "Some words of this list are more frequent than the others.")
    question = _tokens(
        tokenizer, f"\nQuestion: which {num_words} words are the most frequent?\nAnswer:"
    )
    answer = _tokens(tokenizer, " " + ", ".join(bank.words[w] for w in common))
    room = _room(length, "word_extraction", [intro, question, answer], tokenizer)
    lengths = np.array([len(tokens) for tokens in bank.word_tokens])
    words = int(room / lengths[others].mean())
    often = -(-words // (num_words * ratio + len(others)))
    fixed = np.repeat(common, ratio * often)
    repeated = max(0, words // max(often, 1) - num_words * ratio)
    rest = np.concatenate([np.repeat(others[:repeated], often), others[repeated:]])
    fits = int(np.searchsorted(np.cumsum(lengths[rest]), room - lengths[fixed].sum(), side="right"))
    if fits == 0:
        raise HydraError(
            f"synthetic task word_extraction: {num_words} words, ratio {ratio}, do not fit into "
            f"{length} tokens; raise the length"
        )
    order = rng.permutation(np.concatenate([fixed, rest[:fits]]))
    body = [bank.word_tokens[word] for word in order.tolist()]
    return _document(tokenizer, [intro, *body, question], answer, loss)
