"""One micro-batch on one pipeline stage, put together from pieces that run once each.

Layers with the same heads have the same profile, so a stage of many layers takes as long as its few kinds of
layers. A piece gets its input and is measured: bytes kept for the backward, peak bytes of forward and backward,
work. All bytes are relative to those before the piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.model.local_heads import LocalHeads
from megatron_hydra.parallel.head_partition import LayerPartition, plan_model
from megatron_hydra.planning.tape import decoder
from megatron_hydra.planning.tape import operators as op
from megatron_hydra.planning.tape.assembly import Assembly, Bytes, Piece, Stage
from megatron_hydra.planning.tape.rank import Program, Rank
from megatron_hydra.planning.tape.tensors import Tape, Tensor


def stage_layers(model: ModelConfig, rank: Rank) -> list[int]:
    """Layers of all chunks of this pipeline rank."""
    parallel = rank.run.parallel
    chunks = parallel.pipeline * parallel.virtual_pipeline
    per_chunk = model.num_layers // chunks
    first = [
        (chunk * parallel.pipeline + rank.pp_rank) * per_chunk
        for chunk in range(parallel.virtual_pipeline)
    ]
    return [start + i for start in first for i in range(per_chunk)]


class StageBuilder:
    """Runs a stage's pieces.

    Args:
        model: the trained model.
        rank: the rank.
        busiest: whether every layer uses the tensor-parallel rank with the most FA heads, for which the others
            wait, instead of ``rank.tp_rank``.
    """

    def __init__(self, model: ModelConfig, rank: Rank, busiest: bool = False) -> None:
        self.model, self.rank, self.busiest = model, rank, busiest
        parallel = rank.run.parallel
        self.partitions = plan_model(model, parallel.tensor, parallel.fa_partition)
        self.teacher = model.dense() if rank.run.verb in ("align", "distill") else None
        self._teacher_partitions: tuple[LayerPartition, ...] = ()
        if self.teacher is not None:
            self._teacher_partitions = plan_model(self.teacher, parallel.tensor, "heads")
        self._pieces: dict[object, Piece] = {}

    @property
    def is_first(self) -> bool:
        """Whether this stage has the embedding."""
        return self.rank.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage has the loss."""
        return self.rank.pp_rank == self.rank.run.parallel.pipeline - 1

    def heads(self, layer: int, teacher: bool = False) -> LocalHeads:
        """This rank's heads of a layer."""
        if teacher:
            assert self.teacher is not None
            return LocalHeads(self.teacher, self._teacher_partitions[layer], self.rank.tp_rank)
        partition, tp_rank = self.partitions[layer], self.rank.tp_rank
        if self.busiest:
            ranks = range(partition.tp_size)
            tp_rank = max(ranks, key=lambda r: (len(partition.fa[r]), len(partition.gdn[r])))
        return LocalHeads(self.model, partition, tp_rank)

    # -- pieces -------------------------------------------------------------------------------

    def _program(self, tape: Tape, teacher: bool = False) -> Program:
        if teacher:
            assert self.teacher is not None
            return Program(tape, self.rank, self.teacher, trained=False)
        return Program(tape, self.rank, self.model)

    def _kind(self, layers: tuple[int, ...]) -> object:
        """A key that groups of layers with equal profiles share."""
        kinds = []
        for layer in layers:
            h = self.heads(layer)
            kinds.append((
                len(h.fa), len(h.gdn), len(h.replicated_fa), h.fa_kv_of_heads, h.gdn_kv_of_heads,
                h.in_rows_padded, h.num_sharded_padded, len(h.shared_kv_segments),
                tuple(s.rows for s in (*h.in_segments, *h.shared_kv_segments)),
                tuple(h.tied_kv_places.items()) if h.tied else (),
            ))  # fmt: skip
        return tuple(kinds)

    def layer_piece(self, layers: tuple[int, ...]) -> Piece:
        """Profile of consecutive layers; under full recomputation, of those that run again together."""
        key = ("layers", self._kind(layers))
        if key not in self._pieces:

            def run(tape: Tape, x: Tensor) -> Tensor:
                program = self._program(tape)

                def forward(x: Tensor) -> list[Tensor]:
                    for layer in layers:
                        x = decoder.layer(program, self.heads(layer), x)
                    return [x]

                if self.rank.run.recompute.granularity == "full":
                    return op.checkpoint(tape, forward, [x])[0]
                return forward(x)[0]

            self._pieces[key] = self._profile(run)
        return self._pieces[key]

    def teacher_piece(self, layer: int) -> Piece:
        """Profile of a layer of the frozen teacher."""
        if "teacher" not in self._pieces:

            def run(tape: Tape, x: Tensor) -> Tensor:
                with tape.grad_mode(False):
                    return decoder.layer(
                        self._program(tape, teacher=True), self.heads(layer, True), x
                    )

            self._pieces["teacher"] = self._profile(run, differentiated=False)
        return self._pieces["teacher"]

    def align_piece(self, layer: int) -> Piece:
        """Profile of a teacher's layer and the student's attention that learns from it."""
        key = ("align", self._kind((layer,)))
        if key not in self._pieces:

            def run(tape: Tape, x: Tensor) -> Tensor:
                teacher, student = self._program(tape, teacher=True), self._program(tape)
                return decoder.align_layer(
                    teacher, self.heads(layer, True), student, self.heads(layer), x
                )

            self._pieces[key] = self._profile(run, differentiated=False)
        return self._pieces[key]

    def _input(self, tape: Tape) -> Tensor:
        with tape.inside("residual"):
            return tape.empty((self.rank.rows, self.model.hidden_size), self.rank.size)

    def _profile(self, run: Callable[[Tape, Tensor], Tensor], differentiated: bool = True) -> Piece:
        tape = Tape()
        x = self._input(tape)
        found: list[Tensor] = []
        if differentiated:
            x, found = tape.leaf(x)
        tape.reset_peak()
        out = run(tape, x)
        forward = Counter(tape.peak_by_part())
        del x
        edge, shape, size = out.edge, out.shape, out.size
        out = Tensor(None, shape, size, edge)
        kept = Counter({part: count for part, count in tape.by_part.items() if count})
        backward: Bytes = Counter()
        if edge is not None:
            with tape.inside("residual"):
                gradient = tape.empty(shape, size)
            tape.reset_peak()
            roots = [(out, gradient)]
            del gradient, out, edge
            tape.backward(roots)
            backward = Counter(tape.peak_by_part())
            del found
        return Piece(kept, forward, backward, tuple(tape.work), tuple(tape.sent))

    # -- a micro-batch ------------------------------------------------------------------------

    def run(self) -> Stage:
        """All work of one micro-batch on this rank."""
        if self.rank.run.verb == "align":
            return self._align()
        return self._train()

    def _align(self) -> Stage:
        stage = Assembly()
        if self.is_first:
            stage.add_forward(self._embedding(trained=False))
        for layer in stage_layers(self.model, self.rank):
            stage.add_forward(self.align_piece(layer))
        return stage.finished()

    def _groups(self) -> list[tuple[int, ...]]:
        layers = stage_layers(self.model, self.rank)
        recompute = self.rank.run.recompute
        count = recompute.num_layers if recompute.granularity == "full" else 1
        chunk = len(layers) // self.rank.run.parallel.virtual_pipeline
        groups = []
        for start in range(0, len(layers), chunk):
            part = layers[start : start + chunk]
            groups += [tuple(part[i : i + count]) for i in range(0, chunk, count)]
        return groups

    def _train(self) -> Stage:
        stage = Assembly()
        embedding = self._embedding() if self.is_first else None
        if embedding is not None:
            stage.add_forward(embedding)
        pieces = [self.layer_piece(group) for group in self._groups()]
        for piece in pieces:
            stage.add_forward(piece)
        if self.is_last:
            stage.add_forward(final := self._final_norm())
            pieces.append(final)
        if self.teacher is not None:
            self._teach(stage)
        stage.forward_is_over()
        pending: Bytes = Counter()
        if self.is_last:
            stage.add_both(loss := self._loss())
            stage.drop(loss)
            if self.is_first and self.model.tie_embeddings:
                vocabulary, hidden = self._table()
                pending["gradients"] = vocabulary * hidden * self.rank.size
        for piece in reversed(pieces):
            stage.add_backward(piece, pending)
        if embedding is not None:
            stage.add_backward(embedding, pending)
        return stage.finished()

    def _teach(self, stage: Assembly) -> None:
        """The teacher's forward, while all tensors of the student are kept."""
        hidden: Bytes = Counter(residual=self.rank.rows * self.model.hidden_size * self.rank.size)
        stage.hold(hidden)  # the student's last hidden states
        if self.is_first:
            stage.add_forward(self._embedding(trained=False))
        for layer in stage_layers(self.model, self.rank):
            stage.add_forward(self.teacher_piece(layer))
        if self.is_last:
            stage.add_forward(self._final_norm(teacher=True))
        # Both models' hidden states, and the tensor that joins them.
        stage.add_forward(
            Piece(Counter(), Counter({"residual": 3 * hidden["residual"]}), Counter(), (), ())
        )
        stage.release(hidden)

    def _table(self) -> tuple[int, int]:
        return -(-self.model.vocab_size // self.rank.tp), self.model.hidden_size

    def _embedding(self, trained: bool = True) -> Piece:
        def run(tape: Tape, _: Tensor) -> Tensor:
            weight = tape.weight(self._table(), self.rank.size, trained)
            return decoder.embedding(self._program(tape), weight)

        return self._profile_without_input(run)

    def _profile_without_input(self, run: Callable[[Tape, Tensor], Tensor]) -> Piece:
        tape = Tape()
        out = run(tape, Tensor(None, (), 0))
        forward = Counter(tape.peak_by_part())
        out.storage = None
        backward: Bytes = Counter()
        if out.edge is not None:
            with tape.inside("residual"):
                gradient = tape.empty(out.shape, out.size)
            tape.reset_peak()
            roots = [(out, gradient)]
            del gradient
            tape.backward(roots)
            backward = Counter(tape.peak_by_part())
        return Piece(Counter(), forward, backward, tuple(tape.work), tuple(tape.sent))

    def _final_norm(self, teacher: bool = False) -> Piece:
        def run(tape: Tape, x: Tensor) -> Tensor:
            with tape.grad_mode(not teacher):
                return decoder.norm(self._program(tape, teacher), x)

        return self._profile(run, differentiated=not teacher)

    def _loss(self) -> Piece:
        """Forward and backward of the loss, one directly after the other."""
        distill = self.teacher is not None

        def run(tape: Tape, x: Tensor) -> Tensor:
            program = self._program(tape)
            with tape.inside("loss"):
                weight = tape.weight(self._table(), self.rank.size)
                theirs = None
                if distill:
                    theirs = decoder.replicated(program, Tensor(None, x.shape, x.size))
                    both = tape.empty(x.shape, x.size)  # the joined tensor's other half
                hidden = decoder.replicated(program, x)
                out = decoder.token_loss(program, hidden, weight, theirs)
                if distill:
                    del both
                return out

        return self._profile(run)
