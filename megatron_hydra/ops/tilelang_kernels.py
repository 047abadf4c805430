"""TileLang's kernels (FlashQLA), compiled side by side before they are called.

TileLang compiles a kernel when it is asked for, on one core, for up to a minute. FlashQLA asks for about ten
in a forward and backward, one after the other. So the code that asks for them is *played* first: its kernels
do nothing, and each is noted. Any process can then compile a noted kernel (:func:`compile_kernel`). TileLang
keeps it in its cache folder, where the real call finds it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

Noted = dict[str, Any]
"""One kernel, as JSON has it: the module and name of its factory, the factory's arguments, and the length of
its source. The longest sources take longest to compile."""

_DTYPE = "torch.dtype"


@contextlib.contextmanager
def played(note: Callable[[Noted], None]) -> Iterator[None]:
    """While the block runs, TileLang compiles nothing and its kernels do nothing.

    What the block computes is worthless, so use its process for nothing else: caches may keep a part of it.

    Args:
        note: called with each kernel when it is first asked for. A kernel that returns tensors is compiled as
            usual; one whose factory or arguments cannot be named is not noted.
    """
    from tilelang.jit import JITImpl

    noted: list[Noted] = []
    call = JITImpl.__call__

    def play(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The other kind takes tensors, and runs the kernel itself.
        returns_a_kernel = self.initialize_jit_mode(*args, **kwargs) == "lazy"
        if not returns_a_kernel or self.out_idx is not None:
            return call(self, *args, **kwargs)
        kernel = _described(self, args, kwargs)
        if kernel is not None and kernel not in noted:
            noted.append(kernel)
            note(kernel)
        return _do_nothing

    JITImpl.__call__ = play
    try:
        yield
    finally:
        JITImpl.__call__ = call


def compile_kernel(kernel: Noted) -> None:
    """Compile a noted kernel, or find it in TileLang's cache."""
    factory = getattr(importlib.import_module(kernel["module"]), kernel["name"])
    factory(*map(_value, kernel["args"]), **{n: _value(x) for n, x in kernel["kwargs"].items()})


def _do_nothing(*tensors: Any, **others: Any) -> None:
    """In place of a compiled kernel."""


def _described(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Noted | None:
    function = factory.func.orig_func
    module, name = function.__module__, function.__qualname__
    has_this_name = getattr(sys.modules.get(module), name, None) is factory
    if not has_this_name:
        return None
    try:
        return {
            "module": module, "name": name, "args": [_plain(x) for x in args],
            "kwargs": {n: _plain(x) for n, x in kwargs.items()}, "source": len(factory.func_source),
        }  # fmt: skip
    except TypeError:
        return None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {_DTYPE: str(value).removeprefix("torch.")}
    raise TypeError(type(value))


def _value(plain: Any) -> Any:
    return getattr(torch, plain[_DTYPE]) if isinstance(plain, dict) else plain
