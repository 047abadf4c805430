"""Python's parser for one thread at a time, while several threads compile Triton kernels."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_LOCK = threading.RLock()


@contextlib.contextmanager
def one_parser() -> Iterator[None]:
    """While the block runs, Triton parses one kernel's source at a time. Its threads must end in the block.

    Until Python 3.11.8 and 3.12.2, all threads share one counter of the parser's depth. Two of them can end
    with "SystemError: AST constructor recursion depth mismatch" (CPython issue 106905). To parse takes
    milliseconds, and the rest of a compilation stays parallel.
    """
    from triton.runtime.jit import JITFunction

    (owner, *_) = (kind for kind in JITFunction.__mro__ if "parse" in vars(kind))
    parse = owner.parse

    def locked(self: Any) -> Any:
        with _LOCK:
            return parse(self)

    owner.parse = locked
    try:
        yield
    finally:
        owner.parse = parse
