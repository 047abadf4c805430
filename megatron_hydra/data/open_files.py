"""Raise the limit of open files for blends of many sources."""

from __future__ import annotations

import contextlib
import os
import resource

from megatron_hydra.errors import HydraError

_RESERVE = 256
"""Reserve for other files of a process: sockets, libraries, checkpoints."""


def raise_open_file_limit(count: int) -> None:
    """Raise this process's soft limit of open files if ``count`` more files would exceed it.

    Raises:
        HydraError: the system's hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _RESERVE + _open_now()
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise HydraError(
            f"the data need {needed:,} open files, and this process may have {hard:,} (ulimit -Hn): merge "
            "shards with data_prep/merge.py, or have the limit raised"
        )
    with contextlib.suppress(ValueError, OSError):  # then opening a file raises the error
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _open_now() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # no Linux
        return 0
