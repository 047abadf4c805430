"""What the platform does to a process, in processes of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

FAULTS = """
import resource, sys, torch
from megatron_hydra.parallel import platform
if sys.argv[1] == "kept":
    platform.keep_freed_memory()
def step():
    # two at a time: nothing large is free at the end of a round
    return torch.ones(16 << 20) + torch.ones(16 << 20)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a matter of machines without a GPU")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_memory_is_kept_if_asked_for() -> None:
    def page_faults(mode: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert page_faults("kept") * 10 < page_faults("given back")
