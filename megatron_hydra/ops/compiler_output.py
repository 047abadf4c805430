"""Redirect compiler output to a log file: PTX listings, ptxas, nvcc, and loggers of their libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_hydra.errors import HydraError

COMPILE_LOG = "compile.log"
"""Name of the file in a run's folder."""

LIBRARIES = (
    "fla",
    "flash_qla",
    "tilelang",
    "tvm",
    "tvm_ffi",
    "triton",
    "cutlass",
    "torch._inductor",
    "torch._dynamo",
)
"""Packages whose log records and warnings are compiler output."""


_FOLDERS = tuple(name.replace(".", "/") for name in LIBRARIES)


class _LibraryLogHandler(logging.Handler):
    """Writes the records of :data:`LIBRARIES` to the file."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.addFilter(_is_library_log)

    def emit(self, record: logging.LogRecord) -> None:
        os.write(self._descriptor, f"{self.format(record)}\n".encode())


def _is_library_log(record: logging.LogRecord) -> bool:
    return any(record.name == name or record.name.startswith(f"{name}.") for name in LIBRARIES)


def _is_other_log(record: logging.LogRecord) -> bool:
    return not _is_library_log(record)


@contextlib.contextmanager
def compiler_output_to(path: Path, errors: bool = False) -> Iterator[None]:
    """While the block runs, append compiler output to a file.

    This redirects file descriptor 1, also of subprocesses, and log records and warnings of :data:`LIBRARIES`.
    Our own logs and progress bars use descriptor 2 and are not redirected.

    Args:
        path: created if it is missing.
        errors: whether to redirect descriptor 2, too, for a process without a log of its own.

    Raises:
        HydraError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise HydraError(f"the compiler log {path} cannot be written: {error}") from None
    taken = (1, 2) if errors else (1,)
    _flush()
    before = {number: os.dup(number) for number in taken}
    handler, root = _LibraryLogHandler(target), logging.getLogger()
    others = list(root.handlers)
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if any(f"/{name}/" in filename.replace(os.sep, "/") for name in _FOLDERS):
            text = warnings.formatwarning(message, category, filename, lineno, line)
            os.write(target, text.encode())
        else:
            shown(message, category, filename, lineno, file, line)

    try:
        for number in taken:
            os.dup2(target, number)
        for other in others:
            other.addFilter(_is_other_log)
        root.addHandler(handler)
        warnings.showwarning = show
        yield
    finally:
        _flush()
        warnings.showwarning = shown
        root.removeHandler(handler)
        for other in others:
            other.removeFilter(_is_other_log)
        for number, descriptor in before.items():
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(target)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def last_lines(path: Path, count: int = 3) -> str:
    """The end of the file, for an error's message; empty if there is none."""
    with contextlib.suppress(OSError):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(line.strip()[:200] for line in lines[-count:])
    return ""
