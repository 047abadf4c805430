"""One rank of a run for the description of a layer: sizes, groups, documents, kernels."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.config.validate import rounded_stream_length
from megatron_hydra.parallel.packed_sequence import AttentionBlock, PackedSequence
from megatron_hydra.planning.tape.tensors import Tape


@dataclasses.dataclass(frozen=True)
class Rank:
    """A rank and its place in the layout.

    Attributes:
        run: layout, precision, batch, recomputation.
        tp_rank, cp_rank, pp_rank: its place.
        data_parallel: size of the data-parallel group.
        gpu: whether the GPU's kernels run; else the torch twins.
    """

    run: RunConfig
    tp_rank: int = 0
    cp_rank: int = 0
    pp_rank: int = 0
    data_parallel: int = 1
    gpu: bool = True

    @property
    def fla(self) -> bool:
        """Whether FLA's kernels run the delta rule: on a GPU, unless the run names the torch twin."""
        return self.gpu and self.run.backend.gated_delta_net != "torch"

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.run.parallel.tensor

    @property
    def cp(self) -> int:
        """Context-parallel size."""
        return self.run.parallel.context

    @property
    def size(self) -> int:
        """Bytes of an activation or weight."""
        return 2 if self.run.precision == "bf16" else 4

    @property
    def stream(self) -> int:
        """Tokens of a micro-batch, all shards together."""
        return rounded_stream_length(self.run)

    @property
    def tokens(self) -> int:
        """Tokens of this rank's shard."""
        return self.stream // self.cp

    @property
    def rows(self) -> int:
        """Tokens of the residual stream on this rank."""
        return self.tokens // self.tp if self.run.parallel.sequence else self.tokens

    @property
    def sliced(self) -> int:
        """Tokens of this rank's slice, if tensor-parallel ranks split work by sequence."""
        return self.tokens // self.tp

    @property
    def documents(self) -> tuple[int, ...]:
        """Boundaries of the stream's documents: every sequence counts as one document."""
        length, micro = self.run.data.sequence_length, self.run.batch.micro_batch_size
        edges = tuple(range(0, micro * length + 1, length))
        return edges if edges[-1] == self.stream else (*edges, self.stream)

    def block(self, start: int, end: int, window: int | None = None) -> AttentionBlock:
        """The keys that the queries ``start:end`` of the stream see."""
        documents = SimpleNamespace(cu_seqlens=self.documents)
        return PackedSequence.attention_block(documents, start, end, window)  # type: ignore[arg-type]


@dataclasses.dataclass
class Program:
    """A rank's tape and the model that runs on it.

    Attributes:
        tape: the tape.
        rank: the rank.
        model: the model.
        trained: whether the model's weights get gradients (not for a teacher).
    """

    tape: Tape
    rank: Rank
    model: ModelConfig
    trained: bool = True
