"""Load typed configs from files and write them; unknown keys and wrong types are rejected.

Works for any tree of frozen dataclasses with ``bool``, ``int``, ``float``, ``str``, ``Literal``,
``dict``, ``tuple[X, ...]``, nested dataclasses and optionals of these.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron_hydra.config.run import RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.paths import PathText, expanded

T = TypeVar("T")

_DEEPEST = 50
"""Maximum depth of free-form data: data that contains itself would have no end."""
_LARGEST = 2**63

# -- YAML -------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-4`` as a number, not a string, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            # <<: *base; keys of the mapping override it.
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise HydraError(f"line {key_node.start_mark.line + 1}: {key!r} cannot be a key")
            if key in seen:
                line = key_node.start_mark.line + 1
                raise HydraError(f"line {line}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML safely.

    Raises:
        HydraError: naming ``source`` and the line, for syntax errors and repeated keys.
    """
    try:
        return _Loader(text).get_single_data()
    except HydraError as error:
        raise HydraError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise HydraError(f"{source} is not valid YAML: {problem}") from None
    except RecursionError:
        raise HydraError(f"{source} is not valid YAML: it is nested too deeply") from None
    except (ValueError, TypeError, OverflowError, LookupError, AttributeError) as error:
        # PyYAML raises these for a value that only looks like a number, a date or base64.
        raise HydraError(f"{source} is not valid YAML: {error}") from None


# -- dicts to dataclasses ---------------------------------------------------------------------


def from_dict(cls: type[T], body: Any, source: str = "config") -> T:
    """Build the dataclass ``cls`` from plain data.

    Args:
        cls: a dataclass type.
        body: data read from JSON or YAML; absent keys get their defaults.
        source: the file's name, for messages.

    Raises:
        HydraError: an unknown key (with the nearest known one), a missing key, or a value of the
            wrong type; ``source`` and the dotted path of the key are named.
    """
    return _dataclass(cls, body, source, ())


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _where(source: str, path: Sequence[str]) -> str:
    return f"{source}: {'.'.join(path)}" if path else source


def _wrong(source: str, path: Sequence[str], expected: str, value: Any) -> HydraError:
    return HydraError(f"{_where(source, path)} must be {expected}, not {value!r}")


def unknown_key(source: str, path: Sequence[str], known: Sequence[str]) -> HydraError:
    """Error for an unknown key, with the most similar known key."""
    near = difflib.get_close_matches(path[-1], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return HydraError(f"{source}: unknown key {'.'.join(path)!r}; {hint}")


def _dataclass(cls: type[T], body: Any, source: str, path: tuple[str, ...]) -> T:
    if not isinstance(body, Mapping):
        raise _wrong(source, path, "a mapping", body)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in body.items():
        if key not in fields:
            raise unknown_key(source, (*path, str(key)), list(fields))
        hints = _hints(cls)  # type: ignore[arg-type]
        values[key] = _convert(hints[key], value, source, (*path, key))
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING
        if name not in values and no_default and field.default_factory is dataclasses.MISSING:
            raise HydraError(f"{source}: key {'.'.join((*path, name))!r} is missing")
    try:
        return cls(**values)
    except HydraError as error:
        raise HydraError(f"{_where(source, path)}: {error}") from None


def _convert(hint: Any, value: Any, source: str, path: tuple[str, ...]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if hint == PathText:
        text = _scalar(str, value, source, path)
        try:
            return expanded(text)
        except HydraError as error:
            raise HydraError(f"{_where(source, path)}: {error}") from None
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), value, source, path)
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool):
            choices = ", ".join(repr(choice) for choice in arguments)
            raise _wrong(source, path, f"one of {choices}", value)
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return _convert(inner, value, source, path)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong(source, path, "a list", value)
        return tuple(
            _convert(arguments[0], item, source, (*path, str(i))) for i, item in enumerate(value)
        )
    if hint is dict or origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(source, path, "a mapping", value)
        return _check_plain(value, source, path)
    return _scalar(hint, value, source, path)


def _check_plain(value: Any, source: str, path: tuple[str, ...], depth: int = 0) -> Any:
    """Return free-form data unchanged if JSON can store it, because manifests contain it.

    Raises:
        HydraError: names the key that holds a date, a set, bytes, a number that is not finite, or itself.
    """
    if depth > _DEEPEST:
        raise HydraError(f"{_where(source, path)} is nested too deeply")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, int, float)):
                raise _wrong(source, (*path, str(key)), "a key that is a string or a number", key)
        return {k: _check_plain(v, source, (*path, str(k)), depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_check_plain(v, source, (*path, str(i)), depth + 1) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(source, path, "a finite number", value)
    if value is not None and not isinstance(value, (str, int, float)):
        raise _wrong(source, path, "a string, a number, true, false, a list or a mapping", value)
    return value


def _scalar(hint: type, value: Any, source: str, path: tuple[str, ...]) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and not abs(value) < _LARGEST:
        raise _wrong(source, path, "a number that is finite and below 2^63", value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and is_number and float(value).is_integer():
        return int(value)
    if hint is float and is_number:
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    raise _wrong(source, path, names.get(hint, getattr(hint, "__name__", str(hint))), value)


# -- dataclasses to dicts ---------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON-able data of a config dataclass: the inverse of :func:`from_dict`."""
    return _plain(config)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def to_yaml(config: Any) -> str:
    """YAML of a config dataclass, in the order of its fields."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


# -- files and overrides ----------------------------------------------------------------------


def _set_path(body: Any, override: str) -> None:
    """Set one ``section.key=value`` in nested plain data; a number in the path indexes a list."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise HydraError(f"override {override!r} is not of the form section.key=value")
    path = key.split(".")
    for depth, name in enumerate(path):
        if isinstance(body, list):
            if not name.isdecimal() or int(name) >= len(body):
                raise HydraError(
                    f"override {override!r}: {'.'.join(path[:depth])} has {len(body)} items; "
                    f"{name!r} is none of them"
                )
            index: Any = int(name)
        elif isinstance(body, dict):
            index = name
        else:
            raise HydraError(f"override {override!r}: {'.'.join(path[:depth])} has no keys")
        if depth == len(path) - 1:
            body[index] = parse_yaml(text, f"override {override!r}") if text else ""
            return
        body = body.setdefault(index, {}) if isinstance(body, dict) else body[index]


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """A copy of ``config`` with ``section.key=value`` overrides; values are YAML.

    ``data.blend.0.weight=2`` reaches into lists, ``data.blend='[{path: x}]'`` replaces one.

    Raises:
        HydraError: an override of the wrong form, an unknown key or a value of the wrong type.
    """
    body = to_dict(config)
    for override in overrides:
        _set_path(body, override)
    return from_dict(type(config), body, source="override")


def merge_sections(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``update`` into ``base``, section by section; lists and scalars are replaced."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge_sections(merged[key], value) if both else value
    return merged


def read_config(path: str | os.PathLike[str], nested: bool = False) -> dict[str, Any]:
    """One YAML file of a run as plain data, its keys checked.

    ``include: other.yaml`` (a path relative to the file) reads another file first; this file overrides its
    keys. For example, the data of a stage has its own file. An included file cannot include others.

    Raises:
        HydraError: an unreadable file, an unknown key or a value of the wrong type.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # a NUL in the name raises ValueError
        raise HydraError(f"config {path} cannot be read: {error}") from None
    body = parse_yaml(text, str(path))
    body = {} if body is None else body
    base: dict[str, Any] = {}
    if isinstance(body, Mapping) and "include" in body and not nested:
        body = dict(body)
        name = body.pop("include")
        if not isinstance(name, str):
            raise _wrong(str(path), ["include"], "a path", name)
        base = read_config(Path(path).parent / expanded(name), nested=True)
    from_dict(RunConfig, body, source=str(path))
    return merge_sections(base, body)


def load_run_config(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], overrides: Sequence[str] = ()
) -> RunConfig:
    """Read a run's config.

    Args:
        paths: one or several YAML files; later files override earlier ones key by key (for example a
            stage, then a layout).
        overrides: ``section.key=value`` strings, applied last.

    Raises:
        HydraError: an unreadable file, an unknown key, a wrong type, or keys that contradict each
            other (:func:`megatron_hydra.config.validate.check_run`).
    """
    from megatron_hydra.config.validate import check_run

    body: dict = {}
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        body = merge_sections(body, read_config(path))
    config = apply_overrides(from_dict(RunConfig, body), overrides)
    check_run(config)
    return config
