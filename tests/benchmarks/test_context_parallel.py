"""The benchmark's worker processes end in every case."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from benchmarks import context_parallel
from megatron_hydra.errors import HydraError

ARGS = argparse.Namespace(layers=1, hidden=64, seed=0)
DEAF = "import time; time.sleep(600)"
DEAD = "raise SystemExit(3)"


@pytest.fixture
def workers(monkeypatch):
    """Starts processes that run the given scripts in place of workers; a script of None cannot start."""
    started = []
    popen = subprocess.Popen

    def group(*scripts):
        left = iter(scripts)

        def start(_command, **options):
            script = next(left)
            if script is None:
                raise OSError("no more processes")
            started.append(popen([sys.executable, "-c", script], **options))
            return started[-1]

        monkeypatch.setattr(context_parallel.subprocess, "Popen", start)
        return context_parallel.Group(len(scripts), 8, ARGS, 1)

    monkeypatch.setattr(context_parallel, "CLOSING_SECONDS", 0.2)
    yield group, started
    for process in started:
        process.kill()


def test_a_worker_that_does_not_answer_is_killed(workers):
    group, started = workers
    group(DEAF).close()
    assert started[0].poll() is not None


def test_workers_started_before_a_failure_are_ended(workers):
    group, started = workers
    with pytest.raises(OSError, match="no more processes"):
        group(DEAF, None)
    assert [process.poll() is not None for process in started] == [True]


def test_a_worker_that_died_is_reported(workers):
    group, started = workers
    dying = group(DEAD)
    started[0].wait()
    with pytest.raises(HydraError, match="status 3"):
        dying.step()
    dying.close()
