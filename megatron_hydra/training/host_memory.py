"""Host memory for copies of a checkpoint's tensors, reused from save to save.

New memory costs more time than the copy, because the system zeroes every page first. The next save has
copies of the same sizes in the same order, so it uses the same memory again.

Tensors on a GPU are copied through a few page-locked buffers: the device fills one buffer while threads
empty the others. Page-locking all the memory would take seconds at the first save, and no other process
could use this memory.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_hydra.parallel import platform

_BLOCK_BYTES = 256 * 2**20
_ALIGNMENT = 64

STAGING_BYTES = 32 * 2**20
"""Of one page-locked buffer."""

NUM_STAGING = 4
"""Number of buffers, and of threads that empty them. A thread copies a few GB/s."""


class HostMemory:
    """Copies of tensors on the host, valid after :meth:`wait` and until the next :meth:`begin`."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._block = self._used = 0
        self._staging: Staging | None = None

    def begin(self) -> None:
        """Discard all copies and reuse their memory."""
        self._block = self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor from any device to a contiguous host tensor, which is valid after :meth:`wait`."""
        place = self._take(tensor.nbytes)
        copy = place.view(tensor.dtype).view(tensor.shape)
        if tensor.device.type == "cpu" or not platform.device_count():
            copy.copy_(tensor)
            return copy
        if self._staging is None:
            self._staging = Staging(_page_locked, torch.cuda.Event)
        self._staging.copy(tensor.detach(), place)
        return copy

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self._staging is not None:
            self._staging.wait()

    def _take(self, num_bytes: int) -> Tensor:
        while self._block < len(self._blocks):
            block = self._blocks[self._block]
            if self._used + num_bytes <= block.numel():
                break
            self._block, self._used = self._block + 1, 0
        else:
            self._blocks.append(torch.empty(max(_BLOCK_BYTES, num_bytes), dtype=torch.uint8))
        block, start = self._blocks[self._block], self._used
        self._used = start + -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return block[start : start + num_bytes]


def _page_locked(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


@dataclasses.dataclass
class _Buffer:
    """A page-locked buffer, and the thread that empties it, if any."""

    memory: Tensor
    emptied: concurrent.futures.Future[None] | None = None


class Staging:
    """Page-locked buffers between a GPU and ordinary memory.

    Args:
        allocate: function that makes a buffer of a size in bytes.
        event: makes the event that is recorded after the copies into a buffer. A thread waits for it before
            it empties the buffer.
    """

    def __init__(self, allocate: Callable[[int], Tensor], event: Callable[[], Any]) -> None:
        self._event = event
        self._free = collections.deque(_Buffer(allocate(STAGING_BYTES)) for _ in range(NUM_STAGING))
        self._pool = concurrent.futures.ThreadPoolExecutor(NUM_STAGING, "snapshot")
        self._filled = 0
        self._targets: list[tuple[Tensor, int]] = []

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Start to copy a tensor to ``target``, ordinary memory of the same number of bytes."""
        flat = source.contiguous().view(-1).view(torch.uint8)
        done = 0
        while done < flat.numel():
            if self._filled == STAGING_BYTES:
                self._flush()
            count = min(STAGING_BYTES - self._filled, flat.numel() - done)
            memory = self._current().memory
            memory[self._filled : self._filled + count].copy_(
                flat[done : done + count], non_blocking=True
            )
            self._targets.append((target[done : done + count], self._filled))
            # Align the next tensor's first byte for every copy engine.
            self._filled = min(STAGING_BYTES, -(-(self._filled + count) // _ALIGNMENT) * _ALIGNMENT)
            done += count

    def _current(self) -> _Buffer:
        """The buffer to fill next. Wait if a thread still empties it."""
        buffer = self._free[0]
        if buffer.emptied is not None:
            buffer.emptied.result()
            buffer.emptied = None
        return buffer

    def _flush(self) -> None:
        """Start a thread that empties the filled buffer when the device has finished its copies."""
        if not self._targets:
            return
        buffer, targets = self._free[0], self._targets
        event = self._event()
        event.record()

        def empty() -> None:
            event.synchronize()
            for target, start in targets:
                target.copy_(buffer.memory[start : start + target.numel()])

        buffer.emptied = self._pool.submit(empty)
        self._free.rotate(-1)
        self._targets, self._filled = [], 0

    def wait(self) -> None:
        """Wait until all data are in ordinary memory."""
        self._flush()
        for buffer in self._free:
            if buffer.emptied is not None:
                buffer.emptied.result()
                buffer.emptied = None
