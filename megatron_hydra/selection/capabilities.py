"""Capabilities: generators of aligned prompt pairs, for any tokenizer.

On the command line a task is ``name`` or ``name:key=value,key=value``, or ``jsonl:PATH`` for the user's own
prompts. A capability of :data:`GROUPS` has several tasks, which are its sub-probes. Any other task is a
capability by itself. A generator draws texts. If the tokenizer does not align a pair (clean and corrupted
text, or right and wrong answer, have different lengths), the pair is discarded and drawn again.

The corruptions: if the context has several facts, two *keys* are exchanged. The values stay, but the text
before a value changes, so the probe needs the induction mechanism itself. If the context has one fact, its
*value* changes.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_hydra.config.selection import PROBE_TOKENS
from megatron_hydra.data.text import NOISE, distinct_names, random_number, text_sentence
from megatron_hydra.errors import HydraError
from megatron_hydra.ranks import is_first_rank
from megatron_hydra.selection.prompts import (
    Encode,
    PromptPair,
    pair_from_ids,
    pair_from_text,
    read_jsonl,
    text_encoder,
)

_log = logging.getLogger(__name__)

ATTEMPTS_PER_PROMPT = 40


class Capability(Protocol):
    """A generator of prompt pairs.

    Attributes:
        name: unique name within a map.
    """

    @property
    def name(self) -> str:
        """Unique name within a map."""
        ...

    def prompts(
        self, tokenizer: Any | None, vocab_size: int, count: int, seed: int
    ) -> list[PromptPair]:
        """Return at most ``count`` pairs, the same for the same arguments.

        Args:
            tokenizer: a Hugging Face tokenizer, or ``None``.
            vocab_size: vocabulary size of the model.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Texts:
    """A clean and a corrupted text, cut into corresponding segments, and their answers."""

    clean: tuple[str, ...]
    corrupted: tuple[str, ...]
    answer: str
    wrong: str

    def pair(self, encode: Encode) -> PromptPair | None:
        """The pair, or ``None`` if a changed segment has another number of tokens."""
        for i, (a, b) in enumerate(zip(self.clean, self.corrupted, strict=True)):
            if a != b:
                before, after = ("".join(text[: i + 1]) for text in (self.clean, self.corrupted))
                if len(encode(before)) != len(encode(after)):
                    return None
        clean, corrupted = "".join(self.clean), "".join(self.corrupted)
        return pair_from_text(encode, clean, corrupted, self.answer, self.wrong, equal=True)


Draw = Callable[[random.Random, Mapping[str, str], Encode], Texts]


@dataclasses.dataclass(frozen=True)
class TextCapability:
    """Draws texts until enough pairs align.

    Attributes:
        draw: function of (random generator, options, encode) that returns one random text pair.
        options: the options of the task and their defaults, as text.
    """

    name: str
    draw: Draw
    options: Mapping[str, str]

    def prompts(
        self, tokenizer: Any | None, vocab_size: int, count: int, seed: int
    ) -> list[PromptPair]:
        """See :class:`Capability`.

        Raises:
            HydraError: there is no tokenizer, or it aligns too few pairs.
        """
        if tokenizer is None:
            raise HydraError(
                f"--tasks {self.name} generates text, but the model folder has no tokenizer; use "
                "induction or jsonl:PATH with token ids"
            )
        encode = text_encoder(tokenizer)
        generator = random.Random(f"{self.name}/{seed}")
        pairs: dict[PromptPair, None] = {}
        for _ in range(ATTEMPTS_PER_PROMPT * count):
            if len(pairs) == count:
                return list(pairs)
            texts = self.draw(generator, self.options, encode)
            pair = texts.pair(encode)
            if pair is not None and pair.largest_token < vocab_size:
                pairs[pair] = None
        if len(pairs) < count:
            raise HydraError(
                f"--tasks {self.name}: only {len(pairs)} of {count} different prompts could be "
                "aligned token by token with this tokenizer; ask for fewer (--num-prompts) or use "
                "jsonl:PATH"
            )
        return list(pairs)


@dataclasses.dataclass(frozen=True)
class JsonlCapability:
    """The user's own prompts (see :func:`megatron_hydra.selection.prompts.read_jsonl`)."""

    path: Path
    name: str

    def prompts(
        self, tokenizer: Any | None, vocab_size: int, count: int, seed: int
    ) -> list[PromptPair]:
        """The first ``count`` pairs of the file; a message is logged if the file has more.

        Raises:
            HydraError: a line cannot be used, or a token id is outside the vocabulary.
        """
        encode = None if tokenizer is None else text_encoder(tokenizer)
        pairs = read_jsonl(self.path, encode)
        if len(pairs) > count and is_first_rank():
            _log.warning(
                "prompts %s: using the first %d of %d; raise --num-prompts to use more",
                self.path, count, len(pairs),
            )  # fmt: skip
        pairs = pairs[:count]
        for pair in pairs:
            if pair.largest_token >= vocab_size:
                raise HydraError(
                    f"prompts {self.path}: token id {pair.largest_token} is outside the model's vocabulary of "
                    f"{vocab_size}"
                )
        return pairs


@dataclasses.dataclass(frozen=True)
class Induction:
    """Random tokens, then their repetition up to a certain token. The answer is the token after it.

    It needs no tokenizer. The corrupted prompt exchanges that token and another token of the first half.

    Attributes:
        length: number of tokens of the repeated segment.
    """

    name: str = "induction"
    length: int = 24

    def prompts(
        self, tokenizer: Any | None, vocab_size: int, count: int, seed: int
    ) -> list[PromptPair]:
        """See :class:`Capability`.

        Raises:
            HydraError: the vocabulary is smaller than the segment.
        """
        special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
        known = vocab_size if tokenizer is None else min(vocab_size, len(tokenizer))
        ids = [i for i in range(known) if i not in special]
        if len(ids) < self.length or self.length < 4:
            raise HydraError(
                f"--tasks {self.name}: length {self.length} must be 4 or more and at most the "
                f"{len(ids)} tokens of the vocabulary"
            )
        prefix = text_encoder(tokenizer)("") if tokenizer is not None else []
        generator = random.Random(f"{self.name}/{seed}")
        pairs: list[PromptPair] = []
        while len(pairs) < count:
            segment = generator.sample(ids, self.length)
            # At least two tokens apart, so that the exchange does not move an answer.
            asked = generator.randrange(self.length - 3)
            other = generator.randrange(asked + 2, self.length - 1)
            exchanged = list(segment)
            exchanged[asked], exchanged[other] = segment[other], segment[asked]
            tail = segment[: asked + 1]
            pair = pair_from_ids(
                prefix + segment + tail,
                prefix + exchanged + tail,
                [segment[asked + 1]],
                [segment[other + 1]],
            )
            if pair is not None:
                pairs.append(pair)
        return pairs


# -- material -------------------------------------------------------------------------------------

NAMES = [
    "Alice",
    "Bob",
    "Carol",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Irene",
    "Jack",
    "Karen",
    "Leo",
    "Mary",
    "Nick",
    "Olivia",
    "Paul",
    "Ruth",
    "Sam",
    "Tom",
    "Anna",
]
CITIES = [
    "Paris",
    "London",
    "Rome",
    "Berlin",
    "Madrid",
    "Vienna",
    "Tokyo",
    "Moscow",
    "Dublin",
    "Oslo",
    "Prague",
    "Cairo",
    "Delhi",
    "Lima",
    "Boston",
    "Chicago",
]
NOUNS = [
    "apple",
    "river",
    "stone",
    "cloud",
    "tiger",
    "garden",
    "window",
    "mirror",
    "candle",
    "bridge",
    "forest",
    "silver",
    "castle",
    "rocket",
    "planet",
    "shadow",
    "butter",
    "pencil",
    "orange",
    "market",
    "engine",
    "island",
    "letter",
    "summer",
    "winter",
    "dragon",
    "camera",
    "violin",
    "pepper",
    "ticket",
    "barrel",
    "copper",
    "desert",
    "falcon",
    "hammer",
    "jungle",
    "kettle",
    "ladder",
    "magnet",
    "needle",
]
VARIABLES = [
    "width",
    "height",
    "depth",
    "speed",
    "limit",
    "total",
    "count",
    "offset",
    "index",
    "weight",
    "price",
    "score",
    "level",
    "power",
    "radius",
    "margin",
    "buffer",
    "timeout",
    "retries",
    "threads",
]


FACT = "One of the special magic numbers for {} is: {}. "
"""RULER's needle (Hsieh et al., arXiv 2404.06654)."""


def _haystack(
    generator: random.Random,
    options: Mapping[str, str],
    tokens: int,
    encode: Encode,
    taken: Sequence[str],
) -> list[str]:
    """Sentences of about ``tokens`` tokens in total.

    Args:
        taken: names that the needles in a haystack of needles must not use.
    """
    kind = options["haystack"]
    if kind == "text" and options["path"]:
        return _user_sentences(generator, options["path"], tokens, encode)
    names = list(taken)

    def needle() -> str:
        names.extend(distinct_names(generator, 1, names))
        return FACT.format(names[-1], random_number(generator))

    draw: dict[str, Callable[[], str]] = {
        "noise": lambda: " ".join(generator.choices(NOUNS, k=8)).capitalize() + ". ",
        "filler": lambda: NOISE + "\n",
        "text": lambda: text_sentence(generator) + " ",
        "needles": needle,
    }
    begin, sentences, length = len(encode("")), [], 0
    while length < tokens:
        sentences.append(draw[kind]())
        length += len(encode(sentences[-1])) - begin
    return sentences


def _user_sentences(generator: random.Random, path: str, tokens: int, encode: Encode) -> list[str]:
    try:
        words = Path(path).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise HydraError(f"haystack text path={path!r} cannot be read: {error}") from None
    # Every token is at least a part of a word, so these words are enough.
    needed = min(len(words), tokens)
    if needed < 10:
        raise HydraError(f"haystack text {path} has only {len(words)} words")
    start = generator.randrange(len(words) - needed + 1)
    sentences, length = [], 0
    for i in range(start, start + needed, 12):
        sentence = " ".join(words[i : i + 12]) + " "
        length += len(encode(sentence))
        sentences.append(sentence)
        if length >= tokens:
            break
    return sentences


def _names(generator: random.Random, count: int, encode: Encode) -> list[str]:
    """Names such as ``misty-harbor`` with equal numbers of tokens, so that any two can be exchanged."""
    by_length: dict[int, list[str]] = {}
    names: list[str] = []
    while True:
        (name,) = distinct_names(generator, 1, names)
        names.append(name)
        alike = by_length.setdefault(len(encode(FACT.format(name, ""))), [])
        alike.append(name)
        if len(alike) == count:
            return alike


def _with_needles(
    generator: random.Random,
    options: Mapping[str, str],
    encode: Encode,
    facts: Sequence[tuple[str, str]],
) -> Callable[[Sequence[tuple[str, str]], str], tuple[str, ...]]:
    """A text with places for facts at random depths and for a question, in the words of RULER."""
    intro = (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will "
        "quiz you about the number afterwards.\n"
    )
    question = (
        "\nWhat is the special magic number for {0} mentioned in the provided text? The special magic "
        "number for {0} mentioned in the provided text is:"
    )
    names = [name for name, _ in facts]
    around = [intro, question.format(names[0]), *(FACT.format(*fact) for fact in facts)]
    tokens = int(options["tokens"]) - sum(len(encode(text)) for text in around)
    sentences = _haystack(generator, options, max(0, tokens), encode, names)
    places = sorted(generator.randrange(len(sentences) + 1) for _ in facts)

    def fill(facts: Sequence[tuple[str, str]], asked: str) -> tuple[str, ...]:
        text = list(sentences)
        for place, fact in reversed(list(zip(places, facts, strict=True))):
            text.insert(place, FACT.format(*fact))
        return (intro, *text, question.format(asked))

    return fill


def _draw_needle_single(
    generator: random.Random, options: Mapping[str, str], encode: Encode
) -> Texts:
    (key,) = _names(generator, 1, encode)
    value, other = random_number(generator), random_number(generator)
    fill = _with_needles(generator, options, encode, [(key, value)])
    clean, corrupted = fill([(key, value)], key), fill([(key, other)], key)
    return Texts(clean, corrupted, f" {value}", f" {other}")


def _draw_needle_multi(
    generator: random.Random, options: Mapping[str, str], encode: Encode
) -> Texts:
    keys = _names(generator, int(options["keys"]), encode)
    facts = [(key, random_number(generator)) for key in keys]
    a, b = generator.sample(range(len(facts)), 2)
    fill = _with_needles(generator, options, encode, facts)
    clean, corrupted = fill(facts, keys[a]), fill(_keys_exchanged(facts, a, b), keys[a])
    return Texts(clean, corrupted, f" {facts[a][1]}", f" {facts[b][1]}")


def _keys_exchanged(facts: Sequence[tuple[str, str]], a: int, b: int) -> list[tuple[str, str]]:
    changed = list(facts)
    changed[a], changed[b] = (facts[b][0], facts[a][1]), (facts[a][0], facts[b][1])
    return changed


def _draw_facts(generator: random.Random, options: Mapping[str, str], encode: Encode) -> Texts:
    count = int(options["facts"])
    names, cities = generator.sample(NAMES, count), generator.sample(CITIES, count)
    facts = list(zip(names, cities, strict=True))
    a, b = generator.sample(range(count), 2)

    def text(facts: Sequence[tuple[str, str]]) -> tuple[str, ...]:
        lines = [f"{name} lives in {city}. " for name, city in facts]
        return (*lines, f"So, as we have read, {names[a]} lives in")

    return Texts(text(facts), text(_keys_exchanged(facts, a, b)), f" {cities[a]}", f" {cities[b]}")


def _draw_arithmetic(generator: random.Random, options: Mapping[str, str], encode: Encode) -> Texts:
    largest = int(options["largest"])

    def numbers() -> tuple[int, int]:
        return generator.randint(1, largest), generator.randint(1, largest)

    shots = "".join(f"{a} + {b} = {a + b}\n" for a, b in (numbers() for _ in range(4)))
    a, b = numbers()
    # Another first summand gives another sum. The tokenizer decides at which digit the answers differ.
    other = generator.choice([n for n in range(1, largest + 1) if n != a])
    end = f" + {b} ="
    return Texts((shots, str(a), end), (shots, str(other), end), f" {a + b}", f" {other + b}")


def _draw_sequence(generator: random.Random, options: Mapping[str, str], encode: Encode) -> Texts:
    """Numbers at equal distances; the corrupted prompt has other numbers at the same distance."""
    terms, step = int(options["terms"]), generator.randint(2, 9)
    starts = generator.sample(range(10, 60), 2)

    def text(start: int) -> str:
        return ", ".join(str(start + i * step) for i in range(terms)) + ","

    clean, corrupted = map(text, starts)
    answer, wrong = (f" {start + terms * step}" for start in starts)
    return Texts((clean,), (corrupted,), answer, wrong)


def _draw_code(generator: random.Random, options: Mapping[str, str], encode: Encode) -> Texts:
    count = int(options["variables"])
    values = [str(value) for value in generator.sample(range(10, 100), count)]
    names = generator.sample(VARIABLES, count)
    facts = list(zip(names, values, strict=True))
    a, b = generator.sample(range(count), 2)

    def text(facts: Sequence[tuple[str, str]]) -> tuple[str, ...]:
        body = [f"    {name} = {value}\n" for name, value in facts]
        return ("def test_settings():\n", *body, f"    assert {names[a]} ==")

    return Texts(text(facts), text(_keys_exchanged(facts, a, b)), f" {values[a]}", f" {values[b]}")


# -- the registry ----------------------------------------------------------------------------------

Factory = Callable[[str, Mapping[str, str]], Capability]

_TEXT_TASKS: dict[str, tuple[Draw, dict[str, str]]] = {
    "needle_single": (_draw_needle_single, {"haystack": "filler", "tokens": "", "path": ""}),
    "needle_multi": (
        _draw_needle_multi,
        {"haystack": "text", "tokens": "", "keys": "4", "path": ""},
    ),
    "facts": (_draw_facts, {"facts": "5"}),
    "arithmetic": (_draw_arithmetic, {"largest": "49"}),
    "code": (_draw_code, {"variables": "5"}),
    "sequence": (_draw_sequence, {"terms": "5"}),
}
_NUMBERS = {
    "tokens": 1, "keys": 2, "facts": 2, "largest": 5, "variables": 2, "length": 4, "terms": 3,
}  # fmt: skip
_HAYSTACKS = ("noise", "filler", "text", "needles")
_REGISTERED: dict[str, Factory] = {}

GROUPS: dict[str, tuple[str, ...]] = {
    "retrieval": (
        "needle_single:haystack=filler",  # RULER's niah_single_1
        "needle_single:haystack=text",  # niah_single_2
        "needle_multi:haystack=filler",
        "needle_multi:haystack=text",  # niah_multikey_1
        "needle_multi:haystack=needles",  # niah_multikey_2
    ),
    "general": ("induction", "facts", "arithmetic", "code", "sequence"),
}
"""The paper's two capabilities: long-context retrieval and general ability, with their sub-probes."""

# Used if no task is named. Tasks that do not work for a model or its tokenizer are skipped.
DEFAULT_TASKS: tuple[Any, ...] = tuple(GROUPS)


def register_capability(name: str, factory: Factory) -> None:
    """Register a task ``name`` or ``name:key=value,...``.

    Args:
        factory: function of (the task as written, its options) that returns a :class:`Capability`.
    """
    _REGISTERED[name] = factory


def task_names() -> list[str]:
    """Names of all generators."""
    return sorted({*GROUPS, *_TEXT_TASKS, "induction", "jsonl", *_REGISTERED})


def make_capability(task: str, probe_tokens: int = PROBE_TOKENS) -> Capability:
    """Make the generator of a task as written on the command line.

    Args:
        probe_tokens: length of needle prompts without ``tokens``.

    Raises:
        HydraError: the task or an option is unknown, or a value is invalid.
    """
    name, _, rest = task.partition(":")
    if name == "jsonl":
        if not rest:
            raise HydraError("--tasks jsonl: write jsonl:PATH")
        return JsonlCapability(Path(rest), name=f"jsonl:{Path(rest).name}")
    options = _parse_options(task, rest)
    if name in _REGISTERED:
        return _REGISTERED[name](task, options)
    if name == "induction":
        _check_options(task, options, {"length": "24"})
        return Induction(task, int(options.get("length", "24")))
    if name not in _TEXT_TASKS:
        raise HydraError(f"--tasks {task}: no such task; there are {', '.join(task_names())}")
    draw, defaults = _TEXT_TASKS[name]
    _check_options(task, options, defaults)
    if "tokens" in defaults:
        defaults = defaults | {"tokens": str(probe_tokens)}
    return TextCapability(task, draw, {**defaults, **options})


def _parse_options(task: str, text: str) -> dict[str, str]:
    options = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise HydraError(f"--tasks {task}: {part!r} is not key=value")
        options[key] = value
    return options


def _check_options(task: str, options: Mapping[str, str], defaults: Mapping[str, str]) -> None:
    for key, value in options.items():
        if key not in defaults:
            raise HydraError(f"--tasks {task}: no option {key!r}; there are {', '.join(defaults)}")
        if key in _NUMBERS and (not value.isdecimal() or int(value) < _NUMBERS[key]):
            raise HydraError(f"--tasks {task}: {key} must be a number of at least {_NUMBERS[key]}")
    pools = {"facts": len(CITIES), "keys": 64, "variables": len(VARIABLES)}
    for key, size in pools.items():
        if int(options.get(key, "0")) > size:
            raise HydraError(f"--tasks {task}: {key} can be at most {size}")
    if options.get("haystack", "noise") not in _HAYSTACKS:
        raise HydraError(f"--tasks {task}: haystack must be one of {', '.join(_HAYSTACKS)}")
    if options.get("path") and options.get("haystack", defaults.get("haystack")) != "text":
        raise HydraError(f"--tasks {task}: path=FILE needs haystack=text")
