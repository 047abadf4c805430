"""Threads that compile Triton kernels parse one after the other."""

from __future__ import annotations

import ast
import concurrent.futures
import threading
import time

import pytest

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from megatron_hydra.ops.one_parser import one_parser


def _kernel(x):
    pass


def test_one_thread_parses_at_a_time(monkeypatch):
    kernel, parse = JITFunction(_kernel), JITFunction.parse
    inside, most, guard = 0, 0, threading.Lock()
    real = ast.parse

    def slow(*args, **kwargs):
        nonlocal inside, most
        with guard:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        with guard:
            inside -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(triton.runtime.jit.ast, "parse", slow)
    with one_parser(), one_parser(), concurrent.futures.ThreadPoolExecutor(4) as pool:
        trees = list(pool.map(lambda _: kernel.parse(), range(8)))
    assert most == 1 and all(isinstance(tree, ast.Module) for tree in trees)
    assert JITFunction.parse is parse
