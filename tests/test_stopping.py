"""Requests to stop: by signal, by the clock, once and twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_hydra import stopping
from megatron_hydra.errors import HydraError
from megatron_hydra.stopping import Stopped, StopRequest, leave_if_stopped, stop_requested


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        leave_if_stopped()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # through the launcher as well: the same request
        assert stop.requested
        assert stop.reason == "signal"
        with pytest.raises(Stopped) as left:
            leave_if_stopped()
        assert left.value.code == stopping.REQUEUE_EXIT_CODE == 85
    assert signal.getsignal(number) == before
    assert not stop_requested()


def test_a_second_signal_ends_the_process() -> None:
    program = (
        "import os, signal, time\n"
        "from megatron_hydra import stopping\n"
        "stopping._SAME_REQUEST_SECONDS = 0.1\n"
        "with stopping.StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.2)\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 128 + signal.SIGUSR1
    assert "second signal (SIGUSR1): leaving at once" in done.stderr


def test_the_time_limit_of_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert not StopRequest(50).requested
    assert not StopRequest(0).requested
    late = StopRequest(150)
    assert late.requested
    assert late.reason == "time limit"
    monkeypatch.setenv("SLURM_JOB_END_TIME", "tomorrow")
    with pytest.raises(HydraError, match="SLURM_JOB_END_TIME is 'tomorrow'"):
        StopRequest(50)
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert not StopRequest(50).requested
