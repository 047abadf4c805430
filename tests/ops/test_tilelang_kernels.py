"""Played code notes TileLang's kernels and compiles none; another process compiles them from the list.

A stand-in has the parts of TileLang 0.1.15's factories that are used: ``func``, ``out_idx`` and the two modes.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_hydra.ops import tilelang_kernels

MODULE = "kernels_of_this_test"


class _Factory:
    """As ``tilelang.jit.JITImpl``; a lazy one returns a kernel, an eager one runs it."""

    def __init__(self, function: Callable[..., Any], mode: str, out_idx: Any = None) -> None:
        self.func = types.SimpleNamespace(orig_func=function)
        self.func_source = f"source of {function.__name__}"
        self.mode, self.out_idx = mode, out_idx
        self.compiled: list[Any] = []

    def initialize_jit_mode(self, *args: Any, **kwargs: Any) -> str:
        return self.mode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.compiled.append((args, kwargs))
        kernel = self.func.orig_func
        return kernel if self.mode == "lazy" else kernel(*args)


@pytest.fixture
def factories(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of kernels, as FlashQLA's; a kernel adds one to the last of its tensors."""
    found = types.ModuleType(MODULE)

    def add_one(*tensors: torch.Tensor) -> torch.Tensor:
        return tensors[-1].add_(1)

    for name, mode, out_idx in (("first", "lazy", None), ("long_second", "lazy", None),
                                ("eager", "eager", None), ("returning", "lazy", [-1])):  # fmt: skip
        function = types.FunctionType(add_one.__code__, {}, name)
        function.__module__, function.__qualname__ = MODULE, name
        setattr(found, name, _Factory(function, mode, out_idx))
    monkeypatch.setitem(sys.modules, MODULE, found)
    monkeypatch.setitem(sys.modules, "tilelang", tilelang := types.ModuleType("tilelang"))
    jit = types.ModuleType("tilelang.jit")
    jit.JITImpl = _Factory  # type: ignore[attr-defined]
    tilelang.jit = jit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tilelang.jit", jit)
    return found


def test_kernels_are_noted_once_and_do_nothing(factories: types.ModuleType) -> None:
    x = torch.zeros(2)
    noted: list[Any] = []
    with tilelang_kernels.played(noted.append):
        for _ in range(2):
            assert factories.first(14, dtype=torch.bfloat16, packed=True, start=None)(x) is None
        factories.first(13, dtype=torch.bfloat16, packed=True, start=None)(x)
        factories.long_second(14, "float32", 0.5)(x, x)
    assert x.tolist() == [0, 0]
    assert not factories.first.compiled
    assert not factories.long_second.compiled
    noted = json.loads(json.dumps(noted))  # as it goes to another process
    assert [(kernel["name"], kernel["args"][0]) for kernel in noted] == [
        ("first", 14), ("first", 13), ("long_second", 14),
    ]  # fmt: skip
    assert noted[2]["source"] > noted[0]["source"]
    for kernel in noted:
        tilelang_kernels.compile_kernel(kernel)
    assert factories.first.compiled == [
        ((heads,), {"dtype": torch.bfloat16, "packed": True, "start": None}) for heads in (14, 13)
    ]
    assert factories.long_second.compiled == [((14, "float32", 0.5), {})]


def test_after_the_block_kernels_run_again(factories: types.ModuleType) -> None:
    x = torch.zeros(2)
    with pytest.raises(ZeroDivisionError), tilelang_kernels.played(print):
        factories.first(1 // 0)
    factories.first(14)(x)
    assert x.tolist() == [1, 1]
    assert factories.first.compiled == [((14,), {})]


def test_kernels_that_cannot_be_played_run(factories: types.ModuleType) -> None:
    """Their results are needed: those that take tensors at once, and those that return tensors."""
    x = torch.zeros(2)
    noted: list[Any] = []
    with tilelang_kernels.played(noted.append):
        assert factories.eager(x).tolist() == [1, 1]
        assert factories.returning(14)(x).tolist() == [2, 2]
    assert noted == []


def test_a_kernel_that_cannot_be_named_is_not_listed(factories: types.ModuleType) -> None:
    """By a name that leads elsewhere, or by arguments that JSON does not have."""
    x, hidden = torch.zeros(2), factories.first
    factories.first = None  # type: ignore[attr-defined]
    noted: list[Any] = []
    with tilelang_kernels.played(noted.append):
        hidden(14)(x)
        factories.long_second(object())(x)
    assert noted == []
    assert x.tolist() == [0, 0]
