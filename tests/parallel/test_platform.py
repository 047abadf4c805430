"""Effects of the platform module on a process, tested in separate processes."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_hydra.errors import HydraError
from megatron_hydra.parallel import platform

PROGRAM = """
import ctypes, json, torch
from megatron_hydra.parallel import platform

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    _fields_ = [(name, ctypes.c_size_t) for name in names]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo

def of_a_tensor():
    start = mallinfo2()
    block = torch.ones(16 << 20)
    held = mallinfo2()
    del block
    freed = mallinfo2()
    return {"mapped": held.hblkhd - start.hblkhd, "given_back": held.arena - freed.arena,
            "unmapped": held.hblkhd - freed.hblkhd}

by_default = of_a_tensor()
platform.keep_freed_memory()
print(json.dumps([by_default, of_a_tensor()]))
"""
"""glibc's numbers for one large tensor, by default and when freed memory is kept: bytes mapped for it alone,
and bytes returned to the kernel when it is freed (from the heap and by unmapping)."""


def _has_mallinfo() -> bool:
    try:
        return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallinfo2")
    except OSError:
        return False


@pytest.mark.skipif(torch.cuda.is_available(), reason="a matter of machines without a GPU")
@pytest.mark.skipif(not _has_mallinfo(), reason="glibc 2.33 or later")
def test_freed_memory_is_kept_if_asked_for() -> None:
    size = 4 * (16 << 20)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    by_default, kept = json.loads(done.stdout)
    assert by_default["mapped"] >= size  # otherwise the test would prove nothing
    assert by_default["unmapped"] >= size
    assert kept["mapped"] < size
    assert kept["unmapped"] + kept["given_back"] < size


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a matter of machines without a GPU")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_all_groups_of_a_process_share_one_polling_thread() -> None:
    """Another group has only its worker threads, and the timeout that it was made with."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = _threads()
        groups = [dist.new_group([0], timeout=timedelta(seconds=7)), dist.new_group([0])]
        added = _threads() - before
        options = [group._get_backend(torch.device("cpu")).options for group in groups]
        assert added == sum(option._threads for option in options)
        assert options[0]._timeout == timedelta(seconds=7)
        for group in groups:
            ones = torch.ones(2)
            dist.all_reduce(ones, group=group)
            assert torch.equal(ones, torch.ones(2))
    finally:
        dist.destroy_process_group()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank gets the error, also ranks with a GPU: they would wait for the others."""
    platform.check_gpus(2, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(HydraError, match=r"4 processes .* has 2 GPUs \(CUDA_VISIBLE_DEVICES=0,1\)"):
        platform.check_gpus(4, 2)
    bound: list[int] = []
    monkeypatch.setattr(platform, "_CUDA_AVAILABLE", True)
    monkeypatch.setattr(platform, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(HydraError, match="2 processes were started on this node, but it has 1 GPU"):
        platform.bind_process_to_device(0)
    assert not bound
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    platform.bind_process_to_device(0)
    assert bound == [0]


@pytest.mark.parametrize(("given", "chosen"), [(None, [1]), ("7", [])])
def test_a_process_with_a_gpu_has_one_thread_on_the_host(
    given: str | None, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user chose another number. A CPU run keeps torch's own number."""
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(platform, "device_count", lambda: 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(platform, "_CUDA_AVAILABLE", False)
    platform.bind_process_to_device(0)
    assert not threads
    monkeypatch.setattr(platform, "_CUDA_AVAILABLE", True)
    platform.bind_process_to_device(0)
    assert threads == chosen


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_host_tensors_arrive_whole_however_busy_the_device_is(device):
    for length in (1, 100_000):
        if device == "cuda":
            torch.cuda._sleep(100_000_000)
        x = torch.arange(length)[::1]
        copied = platform.to_device(x, torch.device(device))
        del x
        assert copied.device.type == device
        assert torch.equal(copied.cpu(), torch.arange(length))
