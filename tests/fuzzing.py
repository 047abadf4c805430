# ruff: noqa: E501  (tables of values)
"""Inputs with one or two mistakes: arguments, YAML, JSON and other files, the environment."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

NASTY_TEXTS = [
    "", " ", "-1", "0", "1", "2", "-0", "nan", "inf", "-inf", "1e400", "1e18", "9" * 30, "-" + "9" * 30, "0.5",
    "1e-400", "true", "null", "~", "~/nowhere/x", "~nobody-of-that-name/x", "$HYDRA_UNSET/x", "${HYDRA_UNSET}",
    "/dev/null", "/", ".", "..", "nowhere/at/all", "x" * 300, "ä€🙂", "\udc80", "a,b", "a=b", "=", "a:b", ":",
    "jsonl:", "jsonl:nowhere.jsonl", "os:getcwd", "nowhere:at_all", "{}", "[]", "[1", "{a: 1}", "auto", "cpu",
    "cuda:99", "4K", "3:1", "0:0", "1/0", "5/3", "-1/2", "*", "**/*", "[", "--", "-h",
]  # fmt: skip
NASTY_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**400, -(2**70), 0.0, -0.5, 1e-320, 1e308, float("nan"),
    float("inf"), "", "x", "~", "~nobody-of-that-name/x", "$HYDRA_UNSET/x", "/dev/null", "nowhere", "x" * 300,
    "ä€🙂", "1", "1e4", [], [1], [None], ["a", {"b": 1}], [[]], {}, {"a": 1}, {1: 2}, {"": ""}, {None: 1},
]  # fmt: skip
NASTY_YAML = [
    "<<: *nowhere", "<<: 3", "a: &a [*a]", "? [a, b]\n: c", "!!python/object/apply:os.getcwd []", "a: !!int x",
    "a: 2020-13-45", "a: 2020-01-01", "a: !!binary x", "a: !!timestamp x", "a: 0b", "a: 0x", "a: 1_", "a: 1:99:1",
    "\t- a", "a: 'b", "- a", "%YAML 9.9\n---", "---\na: 1\n---\nb: 2", "[" * 2000, "a: " + "{a: " * 500, "\x00", "\ufeff",
    "a: .inf", "a: !!set {b, c}", "a: !!float x", "a: !!omap [b: 1]", "a: !!bool x", "&a !!str b: *a", "seed: .nan",
]  # fmt: skip


def other_text(rng: random.Random, text: str) -> str:
    """A file's text with one thing changed."""
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(8)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif kind == 2:
        key = lines[at].partition(":")[0]
        lines[at] = f"{key}: {rng.choice(NASTY_TEXTS)}"
    elif kind == 3:
        lines.insert(at, rng.choice(NASTY_YAML))
    elif kind == 4:
        lines[at] = "  " * rng.randrange(1, 4) + lines[at]
    elif kind == 5:
        return text[: rng.randrange(len(text) + 1)]
    elif kind == 6:
        at = rng.randrange(len(text) + 1)
        return text[:at] + rng.choice("{}[]:,&*!|>'\"%@`\t\0#-?é🙂") + text[at:]
    else:
        lines[at] = lines[at].strip()
    return "\n".join(lines)


def other_value(rng: random.Random, body: Any) -> Any:
    """Plain data with one value replaced, or one key renamed, doubled or removed."""
    if isinstance(body, dict) and body and rng.random() < 0.85:
        key = rng.choice(list(body))
        changed, kind = dict(body), rng.random()
        if kind < 0.06:
            changed.pop(key)
        elif kind < 0.12:
            changed[f"{key}x"] = changed.pop(key)
        else:
            changed[key] = other_value(rng, body[key])
        return changed
    if isinstance(body, list) and body and rng.random() < 0.8:
        at = rng.randrange(len(body))
        return [*body[:at], other_value(rng, body[at]), *body[at + 1 :]]
    return rng.choice(NASTY_VALUES)


def other_bytes(rng: random.Random, data: bytes) -> bytes:
    """A file that is cut off, lengthened, emptied, or has a few bytes changed."""
    kind = rng.randrange(5)
    if kind == 0 or not data:
        return b""
    if kind == 1:
        return data[: rng.randrange(len(data))]
    if kind == 2:
        return data + rng.randbytes(rng.randrange(1, 50))
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def mutate_file(rng: random.Random, path: Path) -> str:
    """Change one file in place; returns a description for the message of a failed case."""
    data = path.read_bytes()
    if path.suffix in (".yaml", ".json") and rng.random() < 0.6:
        is_yaml = path.suffix == ".yaml"
        load, dump = (yaml.safe_load, yaml.safe_dump) if is_yaml else (json.loads, json.dumps)
        try:
            path.write_text(dump(other_value(rng, load(data))), encoding="utf-8")
            return f"{path.name}: a value changed"
        except (ValueError, yaml.YAMLError):
            pass  # an earlier change
    if path.suffix in (".yaml", ".json", ".jsonl", ".md", ".jinja") and rng.random() < 0.8:
        text = other_text(rng, data.decode("utf-8", errors="replace"))
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        return f"{path.name}: its text changed"
    path.write_bytes(other_bytes(rng, data))
    return f"{path.name}: its bytes changed"


def mutate_arguments(rng: random.Random, arguments: list[str], values: list[str]) -> list[str]:
    """Replace, remove, double or add one argument.

    Args:
        values: arguments of the unchanged case, which may also replace others (files of other kinds).
    """
    changed = list(arguments)
    at = rng.randrange(len(changed)) if changed else 0
    kind = rng.random()
    words = [i for i, word in enumerate(changed) if not word.startswith("--")]
    if kind < 0.75 and words:
        changed[rng.choice(words)] = rng.choice(NASTY_TEXTS + values)
    elif kind < 0.82 and changed:
        del changed[at]
    elif kind < 0.9 and changed:
        changed.insert(at, changed[at])
    else:
        changed.insert(at, rng.choice(NASTY_TEXTS))
    return changed


@dataclasses.dataclass(frozen=True)
class Target:
    """A command to be fuzzed.

    Attributes:
        main: function that takes arguments and returns the exit status.
        arguments: function of the folder with the files; returns arguments that work.
        files: patterns of the files that may be changed.
        extra: options that may be added.
    """

    main: Callable[[list[str]], int]
    arguments: Callable[[Path], list[str]]
    files: tuple[str, ...]
    extra: tuple[str, ...] = ()
