"""The exception for user errors, and how commands report it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any


class HydraError(Exception):
    """Invalid input; the message tells the user how to fix it.

    The message names the file, key or flag that is wrong and says what to do.
    Commands print it without a traceback and exit with status 2.
    """


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's ``main`` so that errors print one line instead of a traceback.

    The exit status is 2 after a :class:`HydraError` or if memory is exhausted. It is 1 if a file cannot be
    read or written; the line then names the file.

    Set ``MEGATRON_HYDRA_TRACEBACK=1`` to also print the traceback.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> int:
        try:
            return main(*args, **kwargs) or 0
        except HydraError as error:
            if os.environ.get("MEGATRON_HYDRA_TRACEBACK") == "1":
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
        except OSError as error:
            if error.filename is None or os.environ.get("MEGATRON_HYDRA_TRACEBACK") == "1":
                raise
            # For a rename, the second name is the user's.
            name = os.fsdecode(error.filename if error.filename2 is None else error.filename2)
            print(f"error: {name}: {error.strerror}", file=sys.stderr, flush=True)
            return 1
        except MemoryError as error:  # the cause is mostly a size that the user gave
            print(f"error: out of memory: {error}", file=sys.stderr, flush=True)
            return 2

    return wrapped
