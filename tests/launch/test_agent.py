"""The agent's logic; test_launch.py and tests/slurm test it with real processes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

AGENT = Path(__file__).resolve().parents[2] / "launch" / "agent.py"


@pytest.fixture(scope="module")
def agent():
    """Load the module, which is not a part of the package."""
    spec = importlib.util.spec_from_file_location("launch_agent", AGENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("codes", "stopping", "status"),
    [
        ({0: 85, 1: 85}, True, 85),
        ({1: 85, 0: -15}, True, 85),  # torchrun ended rank 0 after rank 1 had ended
        ({0: 85}, False, 85),  # the scheduler signalled only the ranks
        ({0: -10}, True, 85),  # no handler yet, nothing to save
        ({0: -10}, False, 138),
        ({0: -9, 1: 85}, True, 137),
        ({0: 1, 1: -15}, True, 1),  # a crash during a stop is still a crash
        ({3: 2}, False, 2),
    ],
)
def test_exit_status(agent, codes: dict[int, int], stopping: bool, status: int) -> None:
    assert agent.exit_status(codes, stopping) == status


_LATE_RANKS = """
import importlib.util, signal, subprocess, sys
spec = importlib.util.spec_from_file_location("launch_agent", sys.argv[1])
agent = importlib.util.module_from_spec(spec)
spec.loader.exec_module(agent)
forwarder = agent.StopForwarder()
forwarder.install()
signal.raise_signal(signal.SIGINT)
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
print(forwarder.stopping, rank.wait())  # 0 by itself
"""


def test_ranks_that_start_after_the_signal_get_it_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LATE_RANKS, str(AGENT)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True", str(-signal.SIGTERM)], done.stderr


def test_a_signal_before_anything_runs_asks_for_a_requeue(tmp_path: Path) -> None:
    errors = tmp_path / "torch" / "distributed" / "elastic" / "multiprocessing" / "errors.py"
    errors.parent.mkdir(parents=True)
    errors.write_text("class ChildFailedError(Exception): pass\n")
    (tmp_path / "torch" / "distributed" / "run.py").write_text("def main(_): raise SystemExit(3)\n")

    def status(while_torch_is_imported: str) -> int:
        (tmp_path / "torch" / "__init__.py").write_text(while_torch_is_imported)
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, str(AGENT)], env=environment, check=False).returncode

    assert status("import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)\n") == 85
    assert status("") == 3  # without a signal it continues
