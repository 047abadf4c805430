"""Ending a process also ends all processes that it has started."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from benchmarks._processes import Family

SLEEPS = "import time; print('here', flush=True); time.sleep(600)"
PARENT = f"""
import subprocess, sys
# As torchrun starts its ranks.
subprocess.run([sys.executable, "-c", {SLEEPS!r}], start_new_session=True)
"""


@pytest.mark.parametrize("parent_first", [False, True], ids=["together", "after its parent"])
def test_a_child_in_a_session_of_its_own_is_ended(parent_first):
    family = Family([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert family.process.stdout.readline() == b"here\n"
    members = [process for process in family.members() if process.pid != family.process.pid]
    assert len(members) == 1
    if parent_first:
        family.process.kill()
        family.process.wait()
        assert len(family.members()) == 1
    family.kill()
    assert family.members() == []
    assert psutil.wait_procs(members, timeout=30)[1] == []


def test_another_family_is_left_alone():
    one, other = (Family([sys.executable, "-c", SLEEPS]) for _ in range(2))
    one.kill()
    assert one.process.returncode == -9
    assert other.process.poll() is None
    other.kill()
    assert other.process.returncode == -9


def test_a_family_that_has_ended_is_no_error():
    family = Family([sys.executable, "-c", ""])
    family.process.wait()
    family.kill()
    assert family.process.returncode == 0
