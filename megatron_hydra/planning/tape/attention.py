"""The attention of a HydraHead layer on a tape: projections, both branches, fusion.

It has the structure of :mod:`megatron_hydra.model.hydra_attention`,
:mod:`~megatron_hydra.model.head_projections` and :mod:`~megatron_hydra.model.head_fusion`, and must have their
memory.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_hydra.model.local_heads import LocalHeads
from megatron_hydra.parallel.head_weights import Segment, total_rows
from megatron_hydra.planning.tape import operators as op
from megatron_hydra.planning.tape.collectives import (
    column_linear,
    gather_sequence,
    row_linear,
    swap,
)
from megatron_hydra.planning.tape.delta_rule import delta_rule
from megatron_hydra.planning.tape.preparation import normed, prepare_heads
from megatron_hydra.planning.tape.rank import Program
from megatron_hydra.planning.tape.softmax import attend
from megatron_hydra.planning.tape.tensors import Tensor

Parts = dict[str, Tensor]


class Attention:
    """One layer's attention on one rank."""

    def __init__(self, program: Program, heads: LocalHeads) -> None:
        self.program, self.heads = program, heads
        self.tape, self.rank, self.model = program.tape, program.rank, program.model
        self.switches = program.model.switches
        self.d = program.model.head_dim
        self.size = program.rank.size

    def _weight(self, *shape: int, size: int | None = None) -> Tensor:
        return self.tape.weight(shape, size or self.size, self.program.trained)

    # -- projections --------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, D]`` → ``[rows, D]``."""
        tape, heads = self.tape, self.heads
        sliced = self._sliced(x) if heads.needs_slice else None
        with tape.inside("attention projections"):
            parts = self._project(x, sliced)
        weights = self._competition(sliced)
        names = list(parts)
        inputs = [*parts.values(), *([] if weights is None else [weights])]

        def mix(*tensors: Tensor) -> list[Tensor]:
            given = dict(zip(names, tensors, strict=False))
            return self._mix(given, tensors[-1] if weights is not None else None)

        mixed = self._computed("attention", mix, inputs)
        with tape.inside("attention projections"):
            return self._output(mixed)

    def _computed(
        self, name: str, run: Callable[..., list[Tensor]], inputs: list[Tensor]
    ) -> list[Tensor]:
        """``run(*inputs)``; also run in the backward if ``name`` is recomputed."""
        recompute = self.rank.run.recompute
        again = recompute.granularity == "selective" and name in recompute.modules
        return op.checkpoint(self.tape, run, inputs) if again else run(*inputs)

    def _branch(self, name: str, run: Callable[[Parts], Tensor], parts: Parts) -> Tensor:
        """One branch's outputs, from the parts whose names begin with the branch's name."""
        own = {key: part for key, part in parts.items() if key.startswith(f"{name}.")}

        def branch(*tensors: Tensor) -> list[Tensor]:
            return [run(dict(zip(own, tensors, strict=True)))]

        return self._computed(name, branch, list(own.values()))[0]

    def _sliced(self, x: Tensor) -> Tensor:
        if self.rank.run.parallel.sequence or self.rank.tp == 1:
            return x
        tape, whole = self.tape, x.shape
        out = op.copy(tape, Tensor(x.storage, (self.rank.sliced, x.shape[1]), x.size))

        def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
            gathered = tape.empty(whole, x_size)
            tape.send("sequence", "tensor", gathered.nbytes * (self.rank.tp - 1) / self.rank.tp)
            return [gathered]

        x_size = x.size
        out.edge = None
        tape.record([x], [out], backward)
        return out

    def _whole(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`_sliced`."""
        if self.rank.tp == 1:
            return x
        tape, shape, size = self.tape, x.shape, x.size
        out = tape.empty((shape[0] * self.rank.tp, *shape[1:]), size)
        tape.send("sequence", "tensor", x.nbytes * (self.rank.tp - 1.0))

        def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
            return [tape.empty(shape, size)]

        tape.record([x], [out], backward)
        return out

    def _project(self, x: Tensor, sliced: Tensor | None) -> Parts:
        heads, tape, hidden = self.heads, self.tape, self.model.hidden_size
        parts: Parts = {}
        if heads.num_sharded_padded:
            weight = self._weight(heads.in_rows_padded, hidden)
            projected = column_linear(self.program, x, weight)
            parts.update(self._split(projected, heads.in_segments))
            if not heads.sharded:
                parts["idle"] = projected
            if heads.in_bias_padded:
                bias = self._weight(heads.in_bias_padded)
                for segment in heads.in_bias_segments:
                    parts[segment.key] = op.add(
                        tape, parts[segment.key], op.narrow(tape, bias, (1, segment.rows))
                    )
        if heads.fa_in_segments and sliced is not None:
            projected = op.linear(
                tape, sliced, self._weight(total_rows(heads.fa_in_segments), hidden)
            )
            parts.update(self._split(projected, heads.fa_in_segments))
            for segment in heads.fa_bias_segments:
                bias = self._weight(1, segment.rows)
                parts[segment.key] = op.add(tape, parts[segment.key], bias)
        if heads.shared_kv_segments and sliced is not None:
            self._add_shared_kv(parts, sliced)
        if heads.tied:
            both = {part: parts.pop(part) for part in "kv" if part in parts}
            for branch, places in heads.tied_kv_places.items():
                for part in "kv":
                    if f"{branch}.{part}" not in parts:
                        parts[f"{branch}.{part}"] = self._columns(both[part], places)
        return parts

    def _split(self, projected: Tensor, segments: tuple[Segment, ...]) -> Parts:
        rows = total_rows(segments)
        if rows != projected.shape[1]:
            projected = op.narrow(self.tape, projected, (projected.shape[0], rows))
        shapes = [(projected.shape[0], s.rows) for s in segments]
        pieces = op.split(self.tape, projected, shapes)
        return {s.key: piece for s, piece in zip(segments, pieces, strict=True)}

    def _add_shared_kv(self, parts: Parts, sliced: Tensor) -> None:
        heads, tape = self.heads, self.tape
        weight = self._weight(total_rows(heads.shared_kv_segments), self.model.hidden_size)
        projected = op.linear(tape, sliced, weight)
        if heads.tied and heads.replicated_fa:
            of_slice = self._split(projected, heads.shared_kv_segments)
            for part in "kv":
                parts[f"fa.{part}"] = self._columns(of_slice[part], heads.tied_kv_places["fa"])
        if not heads.gathers_shared_kv:
            return
        gathered = gather_sequence(self.program, projected, "tensor", "shared_kv")
        shared = self._split(gathered, heads.shared_kv_segments)
        for key, used in heads.shared_kv_used.items():
            columns = self._columns(shared[key], used)
            own = parts.get(key)
            if own is None:
                parts[key] = columns
            else:
                joined = (self.rank.tokens, own.shape[1] + columns.shape[1])
                parts[key] = op.cat(tape, [own, columns], joined)

    def _columns(self, x: Tensor, heads: tuple[int, ...]) -> Tensor:
        """So many heads of ``[T, n·d]``; a copy unless they are all heads."""
        if heads == tuple(range(x.shape[1] // self.d)):
            return x
        shape = (x.shape[0], len(heads) * self.d)
        return op.copy(self.tape, op.narrow(self.tape, x, shape))

    def _competition(self, sliced: Tensor | None) -> Tensor | None:
        if self.switches.fusion != "gated" or sliced is None:
            return None
        tape, heads = self.tape, self.model.num_query_heads
        with tape.inside("fusion"):
            weight = self._weight(heads, self.model.hidden_size)
            logits = op.cast(tape, op.linear(tape, sliced, weight), op.WIDE)
            if self.heads.mixed:
                logits = op.cat(tape, [logits, logits], (logits.shape[0], 2 * heads))
            shares = op.unary(tape, op.unary(tape, logits, save="out"))
            return gather_sequence(self.program, shares, "tensor", "shared_kv")

    # -- branches and fusion ------------------------------------------------------------------

    def _mix(self, parts: Parts, weights: Tensor | None) -> list[Tensor]:
        """Joined outputs of the sharded heads, then of the replicated ones, if the rank has such heads."""
        heads, tape = self.heads, self.tape
        fa = gdn = None
        if heads.layer_has_fa and heads.num_fa_here:
            with tape.inside("full attention"):
                fa = self._branch("fa", self._full_attention, parts)
        if heads.gdn:
            with tape.inside("gdn"):
                gdn = self._branch("gdn", lambda own: delta_rule(self.program, heads, own), parts)
        outs, sharded = [], []
        with tape.inside("fusion"):
            if fa is not None:
                if heads.replicated_fa:
                    outs.append(self._fused([(fa, parts.get("fa.gate"))], weights))
                else:
                    sharded.append((fa, parts.get("fa.gate")))
            if gdn is not None:
                sharded.append((gdn, parts.get("gdn.gate")))
            if sharded:
                joined = self._fused(sharded, weights)
                if heads.mixed:
                    half = (joined.shape[0], joined.shape[1] // 2)
                    joined = op.unary(tape, joined, shape=half, same_gradient=True)
                outs.insert(0, joined)
            elif "idle" in parts:
                outs.insert(0, tape.empty((parts["idle"].shape[0], 0), self.size))
        return outs

    def _full_attention(self, parts: Parts) -> Tensor:
        tape, rank, d = self.tape, self.rank, self.d
        flat = [parts[f"fa.{n}"] for n in "qkv"]
        if (
            self.heads.tied or "fa.k" in self.heads.shared_kv_used
        ):  # else one piece of the projection
            shapes = [x.shape for x in flat[:2]]
            together = (shapes[0][0], shapes[0][1] + shapes[1][1])
            flat[:2] = op.split(tape, op.cat(tape, flat[:2], together), shapes)
        q, k, v = (op.view(tape, x, (x.shape[0], -(-x.shape[1] // d), d)) for x in flat)
        rope = self.switches.fa_rotates(self.heads.layer)
        scaled = self.switches.scales_queries
        q = prepare_heads(self.program, q, rope, scaled, l2=False)
        k = prepare_heads(self.program, k, rope, False, l2=False, calls=0)
        groups = self.heads.fa_kv_of_heads
        n, g = q.shape[1], k.shape[1]
        if not (n % g == 0 and groups == tuple(i // (n // g) for i in range(n))):
            k, v = (op.copy(tape, op.narrow(tape, x, (x.shape[0], n, d))) for x in (k, v))
        axis = "tensor_context" if self.heads.replicated_fa else "context"
        size = rank.cp * (rank.tp if self.heads.replicated_fa else 1)
        place = rank.cp_rank * rank.tp + rank.tp_rank if self.heads.replicated_fa else rank.cp_rank
        return self._sharded(q, k, v, axis, size, place)

    def _sharded(self, q: Tensor, k: Tensor, v: Tensor, axis: str, size: int, place: int) -> Tensor:
        """As :func:`megatron_hydra.parallel.context_parallel.sharded_attention`."""
        tape, length, d = self.tape, q.shape[0], self.d
        window = self.switches.fa_window
        if size == 1:
            return self._attend(q, k, v, 0, length, window)
        joined = op.cat(tape, [k, v], (length, k.shape[1], 2 * d))
        if window is not None:
            halo = window - 1
            before = tape.empty((halo, k.shape[1], 2 * d), k.size)
            tape.send("halo", axis, before.nbytes)
            kv = op.cat(tape, [joined, before], (length + halo, k.shape[1], 2 * d))
            k, v = op.split(tape, kv, [(length + halo, k.shape[1], d)] * 2)
            start = place * length
            return self._attend(q, k, v, start, start + length, window)
        with tape.inside("kv gather"):
            gathered = gather_sequence(self.program, joined, axis, "kv_gather", size)
        k, v = op.split(tape, gathered, [(length * size, k.shape[1], d)] * 2)
        mirror, half, start = size - 1 - place, length // 2, place * length
        if mirror == place or half == 0:
            return self._attend(q, k, v, start, start + length)
        first, second = self._halves(q)
        traded = swap(self.program, second, axis)
        own = self._attend(first, k, v, start, start + half)
        other = self._attend(traded, k, v, mirror * length + half, (mirror + 1) * length)
        return op.cat(tape, [own, swap(self.program, other, axis)], q.shape)

    def _halves(self, q: Tensor) -> tuple[Tensor, Tensor]:
        half = q.shape[0] // 2
        first = op.narrow(self.tape, q, (half, *q.shape[1:]))
        return first, op.narrow(self.tape, q, (q.shape[0] - half, *q.shape[1:]))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, end: int, window: int | None = None
    ) -> Tensor:
        """Attention of queries ``start:end`` of the stream to the keys that they see."""
        block = self.rank.block(start, end, window)
        keys = block.k_end - block.k_start
        if keys != k.shape[0]:
            k, v = (op.narrow(self.tape, x, (keys, *x.shape[1:])) for x in (k, v))
        lengths = [
            (block.cu_q[i + 1] - block.cu_q[i], block.cu_k[i + 1] - block.cu_k[i])
            for i in range(len(block.cu_q) - 1)
        ]
        return attend(self.program, q, k, v, lengths, window)

    def _fused(
        self, branches: list[tuple[Tensor, Tensor | None]], weights: Tensor | None
    ) -> Tensor:
        """Gate, norm and scale of joined heads: ``[T, n·d]``."""
        tape, count = self.tape, sum(o.shape[1] for o, _ in branches)
        scale = None
        if self.switches.fusion != "concat":
            scale = self._weight(count, 1)
            if weights is not None:
                chosen = op.copy(tape, op.narrow(tape, weights, (weights.shape[0], count)))
                scale = op.multiply(tape, chosen, op.view(tape, scale, (1, count)))
        flat = [x for branch in branches for x in branch if x is not None]
        gated = [gate is not None for _, gate in branches]

        def tail(*tensors: Tensor) -> list[Tensor]:
            given = iter(tensors)
            pairs = [(next(given), next(given) if has_gate else None) for has_gate in gated]
            return [self._tail(pairs, next(given, None))]

        return self._computed("tail", tail, [*flat, *([] if scale is None else [scale])])[0]

    def _tail(self, branches: list[tuple[Tensor, Tensor | None]], scale: Tensor | None) -> Tensor:
        tape, d = self.tape, self.d
        count = sum(o.shape[1] for o, _ in branches)
        tokens = branches[0][0].shape[0]
        norm = self.switches.fusion_norm == "rms"
        if self.rank.gpu:
            flat = [x for branch in branches for x in branch]
            return op.fused(
                tape, [*flat, scale], ((tokens, count * d), self.size), save=[*flat, scale],
                backward_bytes={"fusion": tokens * count * op.WIDE} if scale is not None else None,
                launches=(0, 0 if scale is None else 2), triton=(1, 1),
            )  # fmt: skip
        joined = []
        for o, gate in branches:
            wide = op.cast(tape, o, op.WIDE)
            if gate is not None:
                opened = op.unary(tape, op.cast(tape, gate, op.WIDE), save="out")
                opened = op.unary(tape, opened)
                wide = op.multiply(tape, wide, op.view(tape, opened, wide.shape))
                del opened
            if norm:
                wide = normed(self.program, wide)
            if scale is not None:
                rows = 1 if scale.shape == (count, 1) else scale.shape[0]
                part = op.narrow(tape, scale, (rows, o.shape[1], 1))
                part = op.cast(tape, part, op.WIDE)
                wide = op.multiply(tape, wide, part)
            joined.append(op.view(tape, op.cast(tape, wide, self.size), (tokens, o.shape[1] * d)))
            del wide
        if len(joined) == 1:
            return joined[0]
        return op.cat(tape, joined, (tokens, count * d))

    def _output(self, mixed: list[Tensor]) -> Tensor:
        heads, tape, hidden = self.heads, self.tape, self.model.hidden_size
        outs = list(mixed)
        output = None
        if heads.num_sharded_padded:
            joined, wanted = outs.pop(0), heads.num_sharded_padded * self.d
            if joined.shape[1] != wanted:
                joined = op.copy(tape, joined, shape=(joined.shape[0], wanted))
            output = row_linear(self.program, joined, self._weight(hidden, wanted))
        if outs:
            added = op.linear(tape, outs[0], self._weight(hidden, outs[0].shape[1]))
            if not self.rank.run.parallel.sequence:
                added = self._whole(added)
            output = added if output is None else op.add(tape, output, added)
        assert output is not None
        return output
