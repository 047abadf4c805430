"""Options of a step, declared once: a dataclass for both a command line and a YAML section.

    @dataclasses.dataclass(frozen=True)
    class Options:
        num_prompts: int = option(40, "pairs drawn for each capability")

Messages of the library name an option by its flag. If a file gave the values, :func:`worded` replaces the flags
by the file's keys.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_hydra.errors import HydraError

_KEY = "option"


def option(
    default: Any,
    help: str,
    *,
    flag: str = "",
    parse: Callable[[str], Any] | None = None,
    in_one: Callable[[str], tuple[Any, ...]] | None = None,
    count: int = 0,
    metavar: str | tuple[str, ...] | None = None,
    group: str = "",
) -> Any:
    """Declare a field as an option.

    Args:
        default: the default value.
        help: of the flag; ``%(default)s`` stands for the default.
        flag: default: the field's name with dashes, with ``no-`` in front for a truth value that is true by
            default.
        parse: function for a word of the command line; default: the field's type.
        in_one: function for a list that is one word there; default: a list is several words.
        count: number of words of a list, which has so many or none; 0: any number, each word once.
        metavar: in the help; with ``count``, one for each word.
        group: title of its group of flags; empty: none.
    """
    facts = {
        "help": help,
        "flag": flag,
        "parse": parse,
        "in_one": in_one,
        "count": count,
        "metavar": metavar,
        "group": group,
    }
    if isinstance(default, (dict, list)):
        return dataclasses.field(
            default_factory=lambda: type(default)(default), metadata={_KEY: facts}
        )
    return dataclasses.field(default=default, metadata={_KEY: facts})


def flag_of(field: dataclasses.Field[Any]) -> str:
    """``num_prompts`` -> ``--num-prompts``."""
    given = field.metadata[_KEY]["flag"]
    name = field.name.replace("_", "-")
    return given or (f"--no-{name}" if field.default is True else f"--{name}")


def flags(cls: type) -> dict[str, str]:
    """Field → flag, for all fields that are options."""
    return {field.name: flag_of(field) for field in _options(cls)}


def _options(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if _KEY in field.metadata]


def add_options(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    about: Mapping[str, str] | None = None,
    only: tuple[str, ...] = (),
    groups: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Give a parser a flag for every option of a dataclass, group by group.

    Args:
        parser: the command's.
        cls: the dataclass.
        about: title of a group → its help.
        only: the fields with a flag of this command; empty: all fields.
        groups: groups from an earlier call, to add options to them.

    Returns:
        The groups by title.
    """
    hints = typing.get_type_hints(cls)
    groups = {"": parser} if groups is None else groups
    for field in _options(cls):
        if only and field.name not in only:
            continue
        facts = field.metadata[_KEY]
        if facts["group"] not in groups:
            title = facts["group"]
            groups[title] = parser.add_argument_group(title, (about or {}).get(title))
        settings: dict[str, Any] = {"dest": field.name, "help": facts["help"]}
        settings |= _settings(hints[field.name], field.default, facts)
        if facts["metavar"]:
            settings["metavar"] = facts["metavar"]
        groups[facts["group"]].add_argument(flag_of(field), **settings)
    return groups


def _settings(hint: Any, default: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for argparse for a field of this type."""
    if hint is bool:
        return {"action": "store_false" if default else "store_true"}
    if hint is dict:
        return {"nargs": "+", "type": _weight, "default": []}
    settings: dict[str, Any] = {"default": None if default is dataclasses.MISSING else default}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if facts["in_one"]:
            return settings | {"type": facts["in_one"]}
        settings |= {"nargs": facts["count"] or "+", "default": list(default)}
        hint = arguments[0]
    elif origin in (typing.Union, types.UnionType):
        (hint,) = [argument for argument in arguments if argument is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return settings | {"choices": list(typing.get_args(hint))}
    return settings | {"type": facts["parse"] or hint}


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write NAME=NUMBER") from None


def from_arguments(
    cls: type[Any], given: argparse.Namespace, *, only: tuple[str, ...] = (), **others: Any
) -> Any:
    """The dataclass with the values of a command line.

    Args:
        cls: the dataclass given to :func:`add_options`.
        given: the parsed command line.
        only: as for :func:`add_options`.
        others: further fields, which override the command line.
    """
    hints = typing.get_type_hints(cls)
    fields = [field for field in _options(cls) if field.name in (only or given)]
    found = {}
    for field in fields:
        value = getattr(given, field.name)
        if hints[field.name] is dict:
            value = dict(value)
        elif typing.get_origin(hints[field.name]) is tuple:
            value = tuple(value if field.metadata[_KEY]["count"] else dict.fromkeys(value))
        found[field.name] = value
    return cls(**found | others)


def changed(cls: type, source: Any) -> list[str]:
    """Flags of the options of ``cls`` that do not have their defaults in an object of it or a subclass."""
    default = cls()
    return [
        flag for name, flag in flags(cls).items() if getattr(source, name) != getattr(default, name)
    ]


def values(cls: type, source: Any) -> dict[str, Any]:
    """The options of ``cls`` in an object of a subclass."""
    return {field.name: getattr(source, field.name) for field in _options(cls)}


def keys(cls: type, section: str) -> dict[str, str]:
    """Flag → dotted key, for :func:`worded`."""
    return {flag: f"{section}.{name}" for name, flag in flags(cls).items()}


@contextlib.contextmanager
def worded(names: Mapping[str, str]) -> Iterator[None]:
    """In errors, name options as the source of their values does.

    Args:
        names: flag → name in the source.
    """
    try:
        yield
    except HydraError as error:
        text = re.sub(r"--[a-z][a-z-]*", lambda match: names.get(match[0], match[0]), str(error))
        if text == str(error):
            raise
        raise HydraError(text) from error
