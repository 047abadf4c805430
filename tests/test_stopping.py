"""Requests to stop: by signal, by time limit, once and twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_hydra import stopping
from megatron_hydra.errors import HydraError
from megatron_hydra.stopping import Stopped, StopRequest, exit_if_stopped, stop_requested


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        exit_if_stopped()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # also through the launcher: the same request
        assert stop.requested
        assert stop.reason == "signal"
        with pytest.raises(Stopped) as left:
            exit_if_stopped()
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
    assert "second signal (SIGUSR1): exiting at once" in done.stderr


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


_AT_ONCE = """
import os, signal, subprocess, sys, time
from megatron_hydra import stopping
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(helper.pid, flush=True)
with stopping.StopRequest(), stopping.exit_on_stop_signal("compiling"), stopping.kill_group_on_exit(helper.pid):
    print("inside", flush=True)
    {work}
"""


@pytest.mark.parametrize(
    "work",
    [
        "time.sleep(60)",
        # Compiled code that does not return to the interpreter, so no Python handler is called.
        "import ctypes; mutex = ctypes.create_string_buffer(64); "
        "lock = ctypes.CDLL(None).pthread_mutex_lock; lock(mutex); lock(mutex)",
    ],
    ids=["python", "compiled"],
)
def test_with_nothing_to_save_a_signal_ends_the_process_and_its_helpers(work: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _AT_ONCE.format(work=work)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    helper = int(process.stdout.readline())
    assert process.stdout.readline() == "inside\n"
    time.sleep(0.2)  # while the work runs
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == stopping.REQUEUE_EXIT_CODE
    assert "SIGTERM: nothing to save yet (compiling): exiting" in errors
    assert "saving at the next boundary" not in errors
    for _ in range(100):
        state = Path(f"/proc/{helper}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the helper has outlived its process")


def test_exit_on_stop_signal_ends_with_its_block() -> None:
    with StopRequest() as stop:
        with stopping.exit_on_stop_signal("starting"):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(Stopped), stopping.exit_on_stop_signal("starting"):
            raise AssertionError("the signal came before")
    assert signal.set_wakeup_fd(-1) == -1


@pytest.fixture
def sigint():
    """Python's own handler: a background job of a shell ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_recorded_even_in_a_destructor(sigint):
    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)  # Python would drop a KeyboardInterrupt here

    with StopRequest(ctrl_c=True) as stop:
        Interrupted()
        assert stop.reason == "signal"
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
    assert not stop.requested


def test_an_ignored_ctrl_c_stays_ignored(sigint):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest(ctrl_c=True) as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.requested
