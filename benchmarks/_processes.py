"""A process and all that it starts, which end together.

Killing a process group is not enough: torchrun gives every rank a session of its own, and a rank that waits in
a collective outlives a killed torchrun. So a variable in the environment identifies a family.
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
        environment: the command's; ``None``: this process's.
        options: of :class:`subprocess.Popen`.
    """

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        self._token = uuid.uuid4().hex
        variables = {**(os.environ if environment is None else environment), _VARIABLE: self._token}
        self.process: subprocess.Popen = subprocess.Popen(words, env=variables, **options)

    def members(self) -> list[psutil.Process]:
        """The family's live processes."""
        found = []
        for process in psutil.process_iter():
            # Another user's process, or one that has just ended: not of this family.
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_VARIABLE) == self._token:
                    found.append(process)
        return found

    def kill(self) -> None:
        """End all of them at once; does nothing if none is alive.

        A process that a driver keeps alive for a minute is named on stderr and left.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while members := self.members():
            if time.monotonic() > deadline:
                print(f"these processes cannot be ended: {members}", file=sys.stderr, flush=True)
                return
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            # Not our child: psutil would take its exit status, and Popen would then report 0.
            psutil.wait_procs([m for m in members if m.pid != self.process.pid], timeout=5)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.process.wait()
