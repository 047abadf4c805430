"""Tensors without numbers: the live bytes at every moment, by autograd's own rules.

A :class:`Tensor` is a shape on a :class:`Storage`. As in torch, a storage lives as long as something refers to
it: a variable of the program, a node that saved it for the backward, or a gradient buffer. So a description
with the structure of a layer's forward has the layer's memory. The :class:`Tape` counts live bytes by part of
the model, their peak, and the operators' computation and traffic. It relies on CPython's reference counts (a
node never refers to its own output).
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

Shape = tuple[int, ...]
Edge = tuple["Node", int]
Backward = Callable[[list["Tensor | None"]], "list[Tensor | None]"]


@dataclasses.dataclass(frozen=True)
class Work:
    """One operator's work.

    Attributes:
        phase: ``forward``, ``backward`` or ``recompute``.
        part: of the model.
        unit: ``matmul``, ``attention`` (a dense batch: documents of one length, each query with its key),
            ``tail_attention`` (the last queries of a long document),
            ``varlen_attention`` (any other block), ``delta_rule`` (products in chunks), ``flash_qla`` (the same
            if FlashQLA can run), ``solve`` (triangular) or ``memory`` (no products).
        flops: needed FLOPs; a multiplication and an addition count as two.
        counted: what ``torch.utils.flop_counter`` counts (attention without the causal half saved).
        moved: bytes read and written.
        launches: kernels that torch launches.
        triton: kernels that Triton launches, from Python.
        repeats: number of repetitions.
    """

    phase: str
    part: str
    unit: str
    flops: float
    counted: float
    moved: float
    launches: float = 1.0
    triton: float = 0.0
    repeats: int = 1


@dataclasses.dataclass(frozen=True)
class Sent:
    """One collective.

    Attributes:
        phase, part: as in :class:`Work`.
        kind: purpose: ``tensor``, ``sequence``, ``kv_gather``, ``query_swap``, ``state``, ``halo``,
            ``shared_kv``, ``loss``, ``pipeline``, ``data``.
        axis: ``tensor``, ``context``, ``tensor_context``, ``pipeline`` or ``data``: over which ranks.
        sent: bytes that one rank sends.
    """

    phase: str
    part: str
    kind: str
    axis: str
    sent: float
    repeats: int = 1


class Storage:
    """Bytes that an object refers to."""

    __slots__ = ("nbytes", "part", "tape")

    def __init__(self, tape: Tape, nbytes: int) -> None:
        self.tape, self.nbytes, self.part = tape, nbytes, tape.part
        tape.allocated(self)

    def __del__(self) -> None:
        self.tape.released(self)


class Tensor:
    """A shape on a storage, and the node that made it (``None`` for a constant)."""

    __slots__ = ("edge", "shape", "size", "storage")

    def __init__(
        self, storage: Storage | None, shape: Shape, size: int, edge: Edge | None = None
    ) -> None:
        self.storage, self.shape, self.size, self.edge = storage, shape, size, edge

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the shape; the storage may have more (for a view) or none (for a weight)."""
        return self.numel * self.size

    @property
    def needs_grad(self) -> bool:
        """Whether a gradient flows into it."""
        return self.edge is not None


class Node:
    """One step of the backward: from gradients by outputs to gradients by inputs."""

    __slots__ = ("backward", "edges", "order", "outputs", "part", "times")

    def __init__(
        self,
        order: int,
        part: str,
        edges: list[Edge | None],
        outputs: int,
        backward: Backward,
        times: float = 1.0,
    ) -> None:
        self.order, self.part, self.edges, self.times = order, part, edges, times
        self.outputs: int = outputs
        self.backward: Backward | None = backward


class Tape:
    """Runs one rank's program.

    Attributes:
        live, peak: live bytes now, and their maximum since :meth:`reset_peak`.
        by_part: of ``live``, by part of the model.
        at_peak: of ``peak``, by part of the model.
        work, sent: the computation and the traffic so far.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.by_part: dict[str, int] = defaultdict(int)
        self.at_peak: dict[str, int] = {}
        self.work: list[Work] = []
        self.sent: list[Sent] = []
        self.part, self.phase = "other", "forward"
        self.recording = True
        self.times = 1.0
        self._is_peak = False
        self._order = 0

    # -- bytes --------------------------------------------------------------------------------

    def allocated(self, storage: Storage) -> None:
        """Count a new storage."""
        self.live += storage.nbytes
        self.by_part[storage.part] += storage.nbytes
        if self.live > self.peak:
            self.peak, self._is_peak = self.live, True

    def released(self, storage: Storage) -> None:
        """Count a storage that has no references any more."""
        if self._is_peak:
            self.at_peak, self._is_peak = dict(self.by_part), False
        self.live -= storage.nbytes
        self.by_part[storage.part] -= storage.nbytes

    def reset_peak(self) -> None:
        """Start a new measurement from the bytes that are live now."""
        self.peak, self._is_peak, self.at_peak = self.live, False, dict(self.by_part)

    def peak_by_part(self) -> dict[str, int]:
        """Bytes by part at the moment of the peak."""
        if self._is_peak:
            self.at_peak, self._is_peak = dict(self.by_part), False
        return {part: count for part, count in self.at_peak.items() if count}

    def empty(self, shape: Shape, size: int) -> Tensor:
        """A new tensor that needs no gradient."""
        return Tensor(Storage(self, math.prod(shape) * size), shape, size)

    def like(self, x: Tensor) -> Tensor:
        """A new tensor of the same shape and type."""
        return self.empty(x.shape, x.size)

    def transient(self, *nbytes: int) -> None:
        """Count bytes that exist together for a moment within an operator."""
        held = [Storage(self, count) for count in nbytes]
        del held

    # -- modes --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Within the block, allocations belong to ``part``."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Within the block, computation belongs to ``phase``."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextlib.contextmanager
    def grad_mode(self, recording: bool) -> Iterator[None]:
        """Within the block, whether operators are differentiated."""
        before, self.recording = self.recording, recording
        try:
            yield
        finally:
            self.recording = before

    @contextlib.contextmanager
    def standing_for(self, times: float) -> Iterator[None]:
        """Within the block, each launch (also of the backward) counts as ``times`` launches."""
        before, self.times = self.times, times
        try:
            yield
        finally:
            self.times = before

    # -- work ---------------------------------------------------------------------------------

    def compute(
        self,
        unit: str,
        flops: float,
        moved: float,
        counted: float | None = None,
        *,
        launches: float = 1.0,
        triton: float = 0.0,
    ) -> None:
        """Record an operator's work; by default it is one launch by torch."""
        counted = flops if counted is None else counted
        times = self.times
        work = Work(
            self.phase, self.part, unit, flops, counted, moved, launches * times, triton * times
        )
        self.work.append(work)

    def touch(self, *tensors: Tensor | None, launches: float = 1.0) -> None:
        """Record a pass over memory that reads or writes these tensors."""
        moved = float(sum(t.nbytes for t in tensors if t is not None))
        self.compute("memory", 0.0, moved, 0.0, launches=launches)

    def launch(self, launches: float = 0.0, triton: float = 0.0) -> None:
        """Record kernels with little work, whose launches still take host time."""
        self.compute("memory", 0.0, 0.0, 0.0, launches=launches, triton=triton)

    def send(self, kind: str, axis: str, sent: float) -> None:
        """Record a collective: the bytes that this rank sends."""
        if sent:
            self.sent.append(Sent(self.phase, self.part, kind, axis, sent))

    # -- the graph ----------------------------------------------------------------------------

    def record(
        self, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], backward: Backward
    ) -> None:
        """Make ``outputs`` depend on ``inputs``, if one of these needs a gradient.

        Args:
            backward: returns a gradient or ``None`` for each input; it may refer to storages, but not to these
                outputs.
        """
        edges = [None if x is None else x.edge for x in inputs]
        if not self.recording or not any(edges):
            return
        self._order += 1
        node = Node(self._order, self.part, edges, len(outputs), backward, self.times)
        for index, output in enumerate(outputs):
            output.edge = (node, index)

    def weight(self, shape: Shape, size: int, trained: bool = True) -> Tensor:
        """A parameter: its bytes are counted elsewhere; its gradient is added to a buffer."""
        weight = Tensor(None, shape, size)
        if trained:
            node = Node(0, "gradients", [], 1, self._into_buffer)
            weight.edge = (node, 0)
        return weight

    def _into_buffer(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        gradient = grads[0]
        if gradient is not None:  # added to the fp32 buffer: read, read, written
            self.compute("memory", 0.0, gradient.nbytes + 8.0 * gradient.numel, 0.0)
        return []

    def leaf(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``x`` without its history, and the list that will hold its gradient."""
        found: list[Tensor] = []

        def keep(grads: list[Tensor | None]) -> list[Tensor | None]:
            found.extend(g for g in grads if g is not None)
            return []

        detached = Tensor(x.storage, x.shape, x.size)
        detached.edge = (Node(0, self.part, [], 1, keep), 0)
        return detached, found

    def backward(self, roots: list[tuple[Tensor, Tensor]]) -> None:
        """Run the backward from ``(output, gradient)`` pairs, the newest nodes first, as in autograd."""
        buffers: dict[Node, list[Tensor | None]] = {}
        edges = [root.edge for root, _ in roots]
        waiting = _dependencies([edge[0] for edge in edges if edge is not None])
        for (node, index), gradient in (
            (root.edge, grad) for root, grad in roots if root.edge is not None
        ):
            self._accumulate(buffers.setdefault(node, [None] * node.outputs), index, gradient)
        roots.clear()
        ready = [(-node.order, id(node), node) for node in buffers if not waiting[node]]
        heapq.heapify(ready)
        while ready:
            _, _, node = heapq.heappop(ready)
            grads = buffers.pop(node, [None] * node.outputs)
            results = self._apply(node, grads)
            del grads
            for position, edge in enumerate(node.edges):
                if edge is None:
                    continue
                after, index = edge
                result, results[position] = results[position], None
                if result is not None:
                    held = buffers.setdefault(after, [None] * after.outputs)
                    with self.standing_for(after.times):
                        self._accumulate(held, index, result)
                    del result
                waiting[after] -= 1
                if not waiting[after]:
                    heapq.heappush(ready, (-after.order, id(after), after))

    def _apply(self, node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        run = node.backward
        if node.order:  # the next micro-batch may reach a leaf again
            node.backward = None
        assert run is not None, "a graph was run backward twice"
        if not any(g is not None for g in grads):
            return [None] * len(node.edges)
        part = node.part if node.order else "gradients"
        with (
            self.inside(part), self.during("backward"), self.grad_mode(False),
            self.standing_for(node.times),
        ):  # fmt: skip
            return run(grads)

    def _accumulate(self, held: list[Tensor | None], index: int, gradient: Tensor) -> None:
        """Sum of gradients; in place if nothing else refers to the first one."""
        first = held[index]
        if first is None:
            held[index] = gradient
            return
        self.compute("memory", 0.0, 3.0 * first.nbytes, 0.0)
        if first.storage is not None and sys.getrefcount(first.storage) > 2:
            held[index] = self.like(first)


def _dependencies(roots: list[Node]) -> dict[Node, int]:
    """For every node that ``roots`` reach, the number of gradients it waits for."""
    waiting: dict[Node, int] = defaultdict(int)
    seen, stack = set(roots), list(dict.fromkeys(roots))
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            waiting[edge[0]] += 1
            if edge[0] not in seen:
                seen.add(edge[0])
                stack.append(edge[0])
    return waiting
