"""A process and all that it starts, ended together.

Killing a process group does not do it: torchrun gives every rank a session of its own, and a rank that waits
in a collective outlives a torchrun that was killed. So a family is known by a variable in its environment.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

_VARIABLE = "HYDRA_PROCESS_FAMILY"
_PATIENCE_SECONDS = 60


class Family:
    """A command and its descendants.

    Args:
        words: the command.
        environment: of it; ``None``: this process's.
        options: of :class:`subprocess.Popen`.
    """

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        self._token = uuid.uuid4().hex
        variables = {**(os.environ if environment is None else environment), _VARIABLE: self._token}
        self.process: subprocess.Popen = subprocess.Popen(words, env=variables, **options)

    def members(self) -> list[psutil.Process]:
        """Those that are alive."""
        found = []
        for process in psutil.process_iter():
            # Another user's process, or one that has just ended: neither is of this family.
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_VARIABLE) == self._token:
                    found.append(process)
        return found

    def kill(self) -> None:
        """End all of them, at once; does nothing where none is left.

        What a driver keeps from ending for a minute is named on stderr and left.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while members := self.members():
            if time.monotonic() > deadline:
                print(f"these processes cannot be ended: {members}", file=sys.stderr, flush=True)
                return
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            # Not ours: psutil would take its exit status, and Popen then reports 0.
            psutil.wait_procs([m for m in members if m.pid != self.process.pid], timeout=5)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.process.wait()
