"""Faults of ranks over NCCL, and a layout that needs more GPUs than this machine has."""

from __future__ import annotations

import pytest

from megatron_hydra.checkpoint import store
from tests.gpu.chain import WATCHDOG_SECONDS
from tests.gpu.needing import needs

GRACE_SECONDS = 60
"""Seconds from the end of a rank to the end of the job: torchrun gives the other ranks 30 s."""


def _assert_gone(ended, limit):
    assert ended.fault_happened, ended.output[-5000:]
    assert ended.status not in (0, 85), ended.output[-5000:]
    assert ended.left_over == []
    assert ended.seconds_after_fault < limit


def _assert_checkpoint_is_good(suite, job):
    checkpoint = store.resolve_checkpoint(suite.folder / "logs" / job / "out" / "checkpoints")
    store.verify_checkpoint(checkpoint)


@needs("hung")
def test_a_hung_rank_ends_the_job(result, suite, note):
    ended = result("hung")
    _assert_gone(ended, WATCHDOG_SECONDS + GRACE_SECONDS)
    assert ended.seconds_after_fault >= WATCHDOG_SECONDS  # not by another error
    assert "Timeout (" in ended.output
    assert "_hang" in ended.output  # the stacks show where rank 1 hung and what rank 0 did
    assert "train_step" in ended.output
    _assert_checkpoint_is_good(suite, "hung")
    note(
        gone_after=f"{ended.seconds_after_fault:.0f} s with faults.timeout_seconds={WATCHDOG_SECONDS}"
    )


@needs("dead")
def test_a_dead_rank_ends_the_job(result, suite, note):
    ended = result("dead")
    _assert_gone(ended, WATCHDOG_SECONDS + GRACE_SECONDS)
    assert ended.status == 137  # 128 + SIGKILL, from the dead rank
    _assert_checkpoint_is_good(suite, "dead")
    note(gone_after=f"{ended.seconds_after_fault:.0f} s", status=ended.status)


@needs("too_many")
def test_more_ranks_than_gpus_are_refused(result, suite, note):
    """A readable error comes before a model is built."""
    if suite.machine.is_dry_run:
        pytest.skip("a CPU machine has no number of GPUs that could be too small")
    ended, count, output = result("too_many")
    message = _assert_refused(ended, output)
    assert "GPU" in message and str(count) in message
    note(message=message)


@needs("too_large")
def test_a_layout_of_more_gpus_than_the_run_has_is_refused(result, note):
    message = _assert_refused(*result("too_large"))
    assert "parallel.tensor" in message
    note(message=message)


def _assert_refused(ended, output):
    """Assert one readable error, and that nothing was started; returns the error."""
    assert ended.status == 2, ended.output[-3000:]
    messages = {line for line in ended.output.splitlines() if line.startswith("error: ")}
    assert messages, ended.output[-3000:]
    assert "Traceback (most recent call last)" not in ended.output
    assert not output.exists()
    return messages.pop()
