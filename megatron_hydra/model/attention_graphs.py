"""CUDA graphs of a layer's attention: one launch forward, one backward, whatever the layer is made of.

A hybrid layer launches several times as many kernels as a dense one. On a small model, or at a few
thousand tokens, the host needs longer to launch them than the device to run them. A graph is recorded
once and replayed.

Megatron-Core's own graphs (``cuda_graph_impl``, 0.16) exclude ``packed_seq_params`` from what a layer may
get, so that they cannot serve packed documents. Here the documents are read from a
:class:`.StaticSequence`.

Memory: a recorded graph owns what its kernels read and write. All graphs of a model share one pool.
Forward and backward are recorded together, at the first call. ``keeps`` says whether other layers run
between a layer's forward and its backward; then what the backward reads stays reserved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from megatron_hydra.errors import HydraError
from megatron_hydra.ops.device_cache import kept
from megatron_hydra.parallel.packed_sequence import PackedSequence
from megatron_hydra.parallel.static_sequence import StaticSequence, fitting

Tensors = Sequence[torch.Tensor | None]
Attend = Callable[[torch.Tensor, PackedSequence], torch.Tensor]


class Recorder(Protocol):
    """Records work on tensors and replays it."""

    def warm_up(self, work: Callable[[], Tensors]) -> None:
        """Do the work once, for what happens at a first call alone."""
        ...

    def record(self, work: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """The tensors in which results appear, and what makes them appear."""
        ...


class CudaRecorder:
    """Records CUDA graphs, all in one pool of memory and on one stream."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def _on_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
        return self._stream

    def warm_up(self, work: Callable[[], Tensors]) -> None:
        """See :class:`Recorder`."""
        stream, current = self._on_stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            work()
        current.wait_stream(stream)
        torch.cuda.synchronize()

    def record(self, work: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """See :class:`Recorder`."""
        stream = self._on_stream()
        graph = torch.cuda.CUDAGraph()
        # Other threads (readers of data, NCCL's watchdog) may go on using the device meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            results = work()
        return results, graph.replay


class AttentionGraphs:
    """The graphs of all layers of one model.

    Args:
        row: tokens of a row of the streams (``data.sequence_length``).
        keeps: whether other layers run between a layer's forward and its backward.
        recorder: records and replays.
    """

    def __init__(self, row: int, keeps: bool, recorder: Recorder | None = None) -> None:
        self.row, self.keeps = row, keeps
        self.recorder = recorder or CudaRecorder()
        self._sequences: dict[int, StaticSequence] = {}
        self._recorded: dict[Hashable, _Recording] = {}

    def __call__(
        self,
        layer: int,
        attend: Attend,
        parameters: tuple[torch.nn.Parameter, ...],
        x: torch.Tensor,
        packed: PackedSequence,
    ) -> torch.Tensor:
        """``attend(x, packed)``, replayed; recorded at the first call.

        A model that is trained runs without a graph where gradients are off (validation): graphs for a few
        calls would keep memory.

        Args:
            layer: whose graph.
            attend: the layer's work; all that it reads beside its arguments are ``parameters``.
            parameters: of the layer.
            x: ``[T, 1, D]``.
            packed: the stream's documents.

        Returns:
            Like ``x``; it lives in the graph's memory, until the layer's next call.

        Raises:
            HydraError: the work cannot be recorded.
        """
        trained = any(parameter.requires_grad for parameter in parameters)
        learning = torch.is_grad_enabled() and (trained or x.requires_grad)
        if trained and not learning:
            return attend(x, packed)
        sequence = self._sequence_for(packed)
        sequence.load(packed)
        key = (layer, x.shape, x.dtype, learning, learning and x.requires_grad)
        recording = self._recorded.get(key)
        if recording is None or recording.addresses != _addresses(parameters):
            self._recorded.pop(key, None)
            recording = self._record(attend, parameters, x, sequence, learning)
            self._recorded[key] = recording
        if not learning:
            recording.start(x)
            return recording.output
        output: torch.Tensor = _Replayed.apply(recording, x, *recording.learning)
        return output

    def _sequence_for(self, packed: PackedSequence) -> StaticSequence:
        """What holds these documents; where that must grow, its graphs are recorded again."""
        length = packed.length_global
        sequence = self._sequences.get(length)
        if sequence is None or not sequence.holds(packed):
            for key in [k for k, r in self._recorded.items() if r.sequence is sequence]:
                del self._recorded[key]
            sequence = self._sequences[length] = fitting(packed, self.row, sequence)
        return sequence

    def _record(
        self,
        attend: Attend,
        parameters: tuple[torch.nn.Parameter, ...],
        x: torch.Tensor,
        sequence: StaticSequence,
        learning: bool,
    ) -> _Recording:
        try:
            return _Recording(attend, parameters, x, sequence, learning, self.keeps, self.recorder)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise HydraError(
                f"backend.cuda_graphs=attention: a layer's attention cannot be recorded as a CUDA graph here "
                f"({type(error).__name__}: {str(error)[:300]}); set backend.cuda_graphs=off"
            ) from error


class _Recording:
    """Forward and, where something learns, backward of one layer's attention.

    Attributes:
        sequence: whose documents it reads.
        addresses: of the layer's parameters.
        learning: parameters that get gradients.
        output: where the result appears.
    """

    def __init__(
        self,
        attend: Attend,
        parameters: tuple[torch.nn.Parameter, ...],
        x: torch.Tensor,
        sequence: StaticSequence,
        learning: bool,
        keeps: bool,
        recorder: Recorder,
    ) -> None:
        self.sequence, self.addresses = sequence, _addresses(parameters)
        self.learning = tuple(p for p in parameters if learning and p.requires_grad)
        self._x = x.detach().clone().requires_grad_(learning and x.requires_grad)
        self._calls = 0

        self._gradient = torch.zeros_like(x) if learning else None
        inputs = [*([self._x] if self._x.requires_grad else []), *self.learning]
        latest: list[torch.Tensor] = []

        def forward() -> Tensors:
            with torch.set_grad_enabled(learning):
                latest[:] = [attend(self._x, sequence)]
            return latest

        def backward() -> Tensors:
            return torch.autograd.grad(
                latest, inputs, self._gradient, retain_graph=keeps, allow_unused=True
            )

        with kept() as self._read:
            recorder.warm_up(lambda: (*forward(), *(backward() if learning else ())))
            latest.clear()
            (output,), self._forward = recorder.record(lambda: tuple(forward()))
            if learning:
                self._gradients, self._backward = recorder.record(backward)
        assert output is not None
        self.output = output.detach()
        if keeps and learning:
            self._graph = output  # holds what the backward reads
        else:
            latest.clear()  # its memory is free for the graphs of the next layer

    def start(self, x: torch.Tensor) -> int:
        """Replay the forward; returns the number of the call."""
        self._x.detach().copy_(x.detach())
        self._forward()
        self._calls += 1
        return self._calls

    def finish(self, call: int, gradient: torch.Tensor) -> Tensors:
        """Replay the backward of a call.

        Returns:
            Gradients by the input (``None`` where it needs none) and by ``learning``.

        Raises:
            HydraError: the forward has been replayed again since: what the backward reads is gone.
        """
        if call != self._calls:
            raise HydraError(
                "backend.cuda_graphs=attention: a layer ran forward twice before its backward; set "
                "backend.cuda_graphs=off"
            )
        by_parameters = self._gradients[len(self._gradients) - len(self.learning) :]
        for parameter, own in zip(self.learning, by_parameters, strict=True):
            held = parameter.grad
            if held is not None and own is not None and held.data_ptr() == own.data_ptr():
                parameter.grad = held.clone()  # autograd may keep what it was handed
        assert self._gradient is not None
        self._gradient.copy_(gradient)
        self._backward()
        gradients = [None if x is None else x.detach() for x in self._gradients]
        return gradients if self._x.requires_grad else [None, *gradients]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recording: _Recording, x: torch.Tensor, *_learning: torch.Tensor
    ) -> torch.Tensor:
        ctx.recording, ctx.call = recording, recording.start(x)
        return recording.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *ctx.recording.finish(ctx.call, gradient))


def _addresses(parameters: Sequence[torch.Tensor]) -> list[int]:
    return [parameter.data_ptr() for parameter in parameters]
