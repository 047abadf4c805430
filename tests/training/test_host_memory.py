"""Copies of a checkpoint's tensors on the host are exact and use the same memory at every save."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from megatron_hydra.training import host_memory
from megatron_hydra.training.host_memory import HostMemory, Staging


def _tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(40, 50, generator=generator)
    return [
        large,
        large.to(torch.bfloat16)[3:7, ::2],
        large.t()[1:9],
        torch.tensor(7),
        torch.empty(0, 3),
        torch.randint(0, 255, (333,), dtype=torch.uint8, generator=generator),
    ]


def test_copies_are_exact_and_reuse_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_BLOCK_BYTES", 5000)  # less than the largest tensor
    memory, places = HostMemory(), []
    for _ in range(2):
        tensors = _tensors()
        memory.begin()
        copies = [memory.copy(tensor) for tensor in tensors]
        memory.wait()
        for copy, tensor in zip(copies, tensors, strict=True):
            assert copy.is_contiguous() and copy.dtype == tensor.dtype
            assert torch.equal(copy, tensor)
        tensors[0].zero_()
        assert copies[0].any()
        places.append([copy.data_ptr() for copy in copies])
    assert places[0] == places[1]


class _Event:
    """An event of a slow device: earlier work ends a moment after the event is recorded."""

    recorded = 0

    def __init__(self) -> None:
        self._done = threading.Event()

    def record(self) -> None:
        type(self).recorded += 1
        threading.Timer(0.01, self._done.set).start()

    def synchronize(self) -> None:
        assert self._done.wait(10)


def test_copies_through_small_buffers_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors larger than a buffer, several in one buffer, and more than all buffers hold."""
    monkeypatch.setattr(host_memory, "STAGING_BYTES", 1024)
    buffers = []

    def allocate(num_bytes: int) -> torch.Tensor:
        buffers.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return buffers[-1]

    staging = Staging(allocate, _Event)
    for _ in range(2):
        tensors = _tensors()
        targets = [torch.zeros(tensor.nbytes, dtype=torch.uint8) for tensor in tensors]
        for tensor, target in zip(tensors, targets, strict=True):
            staging.copy(tensor, target)
        staging.wait()
        for tensor, target in zip(tensors, targets, strict=True):
            assert torch.equal(target.view(tensor.dtype).view(tensor.shape), tensor)
    assert len(buffers) == host_memory.NUM_STAGING
    assert _Event.recorded > 2 * host_memory.NUM_STAGING


def test_a_buffer_is_not_filled_again_before_it_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds however slow the threads are that empty a buffer."""
    monkeypatch.setattr(host_memory, "STAGING_BYTES", 64)
    monkeypatch.setattr(host_memory, "NUM_STAGING", 2)

    class SlowEvent(_Event):
        def synchronize(self) -> None:
            super().synchronize()
            time.sleep(0.02)

    staging = Staging(lambda n: torch.zeros(n, dtype=torch.uint8), SlowEvent)
    source = torch.arange(64 * 7, dtype=torch.int32).to(torch.uint8)
    target = torch.zeros_like(source)
    staging.copy(source, target)
    staging.wait()
    assert torch.equal(source, target)


@pytest.mark.gpu
def test_copies_of_a_gpu_are_exact() -> None:
    memory = HostMemory()
    for seed in range(2):
        generator = torch.Generator("cuda").manual_seed(seed)
        tensors = [
            torch.randn(3 * 2**20 + i, device="cuda", generator=generator).to(dtype)
            for i, dtype in enumerate((torch.float32, torch.bfloat16) * 6)
        ]
        tensors += [tensors[0][: 2**20].view(1024, 1024).t(), tensors[1][5:], torch.tensor(3.0)]
        memory.begin()
        copies = [memory.copy(tensor) for tensor in tensors]
        memory.wait()
        for copy, tensor in zip(copies, tensors, strict=True):
            assert torch.equal(copy, tensor.cpu())
