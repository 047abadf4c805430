"""The part of a checkpoint that one rank writes: boxes of global tensors, and their data on the host."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_hydra.checkpoint.records import Box, records_of
from megatron_hydra.checkpoint.sharded import box_of, main_replicas
from megatron_hydra.training.host_memory import HostMemory


class Snapshot:
    """Collects tensors. It is complete after :meth:`wait`.

    Args:
        memory: memory for the copies; the previous snapshot in it is discarded.
        copying: copy tensors on the host as well, so that they may change while the snapshot is written.
            Tensors on a device are always copied.

    Attributes:
        boxes: the boxes; each is one record.
        tensors: the data of the boxes.
    """

    def __init__(self, memory: HostMemory, *, copying: bool) -> None:
        self._memory, self._copying = memory, copying
        self.boxes: list[Box] = []
        self.tensors: list[Tensor] = []
        memory.begin()

    def add(self, state: Any, *, is_copy: bool = False) -> None:
        """Add the part of a nested sharded state that this rank saves.

        Args:
            is_copy: whether the tensors are private copies, which nothing else changes.
        """
        for tensor in main_replicas(state):
            box, data = box_of(tensor), tensor.data
            assert data is not None
            data = data.detach()
            if data.device.type != "cpu" or (self._copying and not is_copy):
                data = self._memory.copy(data)
            data = data.view(box.shape)
            for record in records_of(box):
                self.boxes.append(record)
                first = record.offset[0] - box.offset[0] if record.shape else 0
                self.tensors.append(data[first : first + record.shape[0]] if record.shape else data)

    def wait(self) -> None:
        """Wait until all data are on the host."""
        self._memory.wait()
