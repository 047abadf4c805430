"""The Gated DeltaNet branch on a tape: convolution, preparation, the chunked rule.

It has the structure of :mod:`megatron_hydra.model.gated_delta_net` and
:mod:`megatron_hydra.ops.gated_delta_rule` (torch twin), or describes what FLA's kernels keep (GPU).
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_hydra.model.local_heads import LocalHeads
from megatron_hydra.ops.gated_delta_rule import (
    GROUP_ELEMENTS,
    MAX_CHUNK,
    MIN_CHUNK,
    step_groups,
    widest_elements,
)
from megatron_hydra.ops.integers import next_power_of_2
from megatron_hydra.ops.linear_rules import CHUNK, FlaKernels, rule_of_model
from megatron_hydra.ops.sharded_delta_rule import shards_of
from megatron_hydra.planning.tape import operators as op
from megatron_hydra.planning.tape.preparation import prepare_heads
from megatron_hydra.planning.tape.rank import Program
from megatron_hydra.planning.tape.tensors import Storage, Tensor

EXCHANGE_LAUNCHES = (12, 8)
"""torch's launches around a shard's kernels: start states, the gather, the scan of the maps."""

MOST_GROUPS, MOST_STRIDES = 64, 64
"""If there are more groups of chunks, or steps of a scan, the description has so many strides; the memory is
the same."""


def delta_rule(program: Program, heads: LocalHeads, parts: dict[str, Tensor]) -> Tensor:
    """Outputs ``[T, n, d]`` of this rank's GDN heads."""
    tape, rank, d = program.tape, program.rank, program.model.head_dim
    switches, tokens, n = program.model.switches, rank.tokens, len(heads.gdn)
    q, k, v, b, a = (parts[f"gdn.{name}"] for name in "qkvba")
    if switches.short_conv:
        if rank.cp > 1:
            channels = q.shape[1] + k.shape[1] + v.shape[1]
            tape.send("halo", "context", (switches.conv_width - 1.0) * channels * rank.size)
        # One convolution of all channels (joining them is a launch); on a GPU it is one kernel.
        tape.launch(1)
        q, k, v = (_convolved(program, x, calls) for x, calls in ((q, 1), (k, 0), (v, 0)))
    q, k, v = (op.view(tape, x, (tokens, x.shape[1] // d, d)) for x in (q, k, v))
    rope = switches.gdn_position == "rope"
    q = prepare_heads(program, q, rope, scaled=False, l2=True)
    k = prepare_heads(
        program, k, rope, scaled=False, l2=True, calls=0 if switches.short_conv else 1
    )
    rule = rule_of_model(switches)
    if rank.gpu and not rule.decays_by_channel:
        log_alpha, beta = _fused_gates(program, a, b, n)
    else:
        log_alpha = _gates(program, a, n)
        beta = op.unary(tape, op.cast(tape, b, op.WIDE), save="out")
    if switches.fa_window is not None:
        k, v = (_delayed(program, x) for x in (k, v))
        log_alpha, beta = (_delayed(program, x) for x in (log_alpha, beta))
    if heads.gdn_kv_of_heads != tuple(range(n)):
        k, v = (op.copy(tape, op.narrow(tape, x, (tokens, n, d))) for x in (k, v))
    if rank.fla and rule.fla is not None:
        return _fla(program, rule.fla, q, k, v, log_alpha, beta)
    return _chunked(program, q, k, v, log_alpha, beta)


def _gates(program: Program, a: Tensor, n: int) -> Tensor:
    """Log α in fp32: ``[T, n]``, or ``[T, n, d]`` with a decay for each channel."""
    tape = program.tape
    bias, decay = (tape.weight((1, count), op.WIDE, program.trained) for count in (a.shape[1], n))
    decay = op.unary(tape, op.unary(tape, decay, save="out"))
    dt = op.unary(tape, op.add(tape, op.cast(tape, a, op.WIDE), bias), save="in")
    if a.shape[1] != n:
        dt = op.view(tape, dt, (a.shape[0], n, a.shape[1] // n))
    return op.multiply(tape, dt, decay)


def _fused_gates(program: Program, a: Tensor, b: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Log α and β by one kernel each way, then a sum for the two parameters."""
    tape = program.tape
    trained = [tape.weight((1, n), op.WIDE, program.trained) for _ in range(2)]
    log_alpha = op.fused(
        tape, [a, *trained], (a.shape, op.WIDE), save=[a], launches=(0, 1), triton=(1, 1)
    )
    return log_alpha, op.fused(tape, [b], (b.shape, op.WIDE), save=[b], launches=(0, 0))


def _delayed(program: Program, x: Tensor) -> Tensor:
    """The tokens one window earlier: joined with zeros or a halo, shifted, masked."""
    tape, window = program.tape, program.model.switches.window
    before = tape.empty((window, *x.shape[1:]), x.size)
    if program.rank.cp > 1:
        tape.send("halo", "context", float(before.nbytes))
    joined = op.cat(tape, [before, x], (window + x.shape[0], *x.shape[1:]))
    return op.unary(tape, op.narrow(tape, joined, x.shape))


def _convolved(program: Program, x: Tensor, calls: int) -> Tensor:
    """As ``ops.short_conv``: a masked, weighted copy of ``x`` for every tap.

    Args:
        calls: calls of the GPU's kernel; 0: the call for other channels also convolves these.
    """
    tape, width = program.tape, program.model.switches.conv_width
    tokens, channels = x.shape
    weight = tape.weight((channels, width), x.size, program.trained)
    if program.rank.gpu:
        return op.fused(
            tape, [x, weight], (x.shape, x.size), save=[x], launches=(0, 2 * calls),
            triton=(calls, calls),
        )  # fmt: skip
    edge = tape.empty((width - 1, channels), x.size)
    extended = op.cat(tape, [edge, x], (tokens + width - 1, channels))
    y = op.multiply(tape, x, op.narrow(tape, weight, (1, channels)))
    for _ in range(1, width):
        shifted = op.unary(tape, op.narrow(tape, extended, x.shape))
        y = op.add(tape, y, op.multiply(tape, shifted, op.narrow(tape, weight, (1, channels))))
        del shifted
    return y


def _exchange_bytes(program: Program, n: int) -> tuple[float, float]:
    """Bytes that a rank sends for the states of one layer in fp32, forward and backward. Every other shard gets
    its state (with the transition if a document goes through a whole shard), and later a gradient.
    """
    rank, d = program.rank, program.model.head_dim
    shards = shards_of(rank.documents, rank.cp)
    crosses, through = (
        any(of) for of in zip(*((s.goes_on, s.through) for s in shards), strict=True)
    )
    state = crosses * (rank.cp - 1.0) * n * d * d * op.WIDE
    return (1.0 + through) * state, state


# -- GPU ------------------------------------------------------------------------------------------


def _fla(
    program: Program,
    fla: FlaKernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
) -> Tensor:
    """FLA's kernels, as the rule declares them: they keep q, k, v and gates, and compute states again."""
    tape, (tokens, n, d) = program.tape, q.shape
    rule, chunks = rule_of_model(program.model.switches), -(-tokens // CHUNK)
    row, states = tokens * n * d * q.size, chunks * n * d * d * q.size
    squares = fla.kept_squares * tokens * n * CHUNK * q.size
    rows, gate = fla.forward_rows * row, log_alpha.numel * op.WIDE
    gradients = fla.fp32_gradients * tokens * n * d * op.WIDE
    flops = float(n * rule.flops(tokens, d))
    can_be_qla = d == fla.flash_qla_head_dim
    shared = program.rank.cp > 1
    launches, more = fla.launches, fla.shard_launches
    around = EXCHANGE_LAUNCHES if shared and not fla.exchanges_states else (0, 0)
    if shared:
        forward_bytes, backward_bytes = _exchange_bytes(program, n)
        if fla.exchanges_states:  # FLA gathers every shard's state and transition, both ways
            forward_bytes = backward_bytes = (program.rank.cp - 1.0) * n * d * 2 * d * op.WIDE
        tape.send("state", "context", forward_bytes)
    out = op.fused(
        tape, [q, k, v, log_alpha, beta], (q.shape, q.size),
        save=[q, k, v, beta], keep=squares + gate,
        forward_bytes={"gdn": rows, "gdn states": states},
        # The forward's rows and states again, three gradients of q's size, those in fp32, those of states.
        backward_bytes={"gdn": rows + 3 * row + gradients, "gdn states": 2 * states},
        work=[("flash_qla" if can_be_qla else "delta_rule", flops, 2.5 * flops)],
        launches=around,
        triton=(launches[0] + shared * more[0], launches[1] + shared * more[1]),
    )  # fmt: skip
    if shared and out.needs_grad:
        _send_in_backward(program, out, backward_bytes)
    return out


def _send_in_backward(program: Program, out: Tensor, count: float) -> None:
    assert out.edge is not None
    node = out.edge[0]
    inner, tape = node.backward, program.tape
    assert inner is not None

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        tape.send("state", "context", count)
        return inner(grads)

    node.backward = backward


# -- the torch twin -------------------------------------------------------------------------------


def chunk_length(longest: int, d: int) -> int:
    """The chunk length that ``chunked_gated_delta_rule`` chooses."""
    chunk = min(MAX_CHUNK, max(MIN_CHUNK, next_power_of_2(d)))
    return min(chunk, max(MIN_CHUNK, next_power_of_2(longest)))


def _chunked(
    program: Program, q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor
) -> Tensor:
    tape, (tokens, n, d), narrow = program.tape, q.shape, q.size
    start = program.rank.cp_rank * tokens
    cu = program.rank.block(start, start + tokens).cu_q
    lengths = [b - a for a, b in zip(cu, cu[1:], strict=False)]
    chunk = chunk_length(max(lengths), d)
    count = sum(-(-length // chunk) for length in lengths)
    chunks = [_to_chunks(program, x, (count, n, chunk)) for x in (q, k, v, log_alpha, beta)]
    del q, k, v, log_alpha, beta
    state = tape.empty((n, d, d), op.WIDE)
    all_maps = None
    values = n * chunk * d
    widest = widest_elements(
        values, values, rule_of_model(program.model.switches).decays_by_channel
    )
    steps = max(1, GROUP_ELEMENTS // widest, -(-count // MOST_GROUPS))
    if program.rank.cp > 1:  # the entering state is known only after all maps
        all_maps, steps = _maps(program, chunks), count
        state = _exchange(program, all_maps[0], all_maps[1], count, n)
    sizes = [min(steps, count - done) for done in range(0, count, steps)]
    parts = [op.split(tape, x, [(size * n, *x.shape[1:]) for size in sizes]) for x in chunks]
    del chunks
    outputs = []
    chunks_of = [-(-length // chunk) for length in lengths]
    widths = [sum(c > step for c in chunks_of) for step in range(max(chunks_of))]
    groups = 1 if all_maps else len(step_groups(widths, widest))
    times = groups / len(sizes)
    for size, group in zip(sizes, zip(*parts, strict=True), strict=True):
        with tape.standing_for(times):
            transition, write, read, own = all_maps or _maps(program, list(group))
        # A step of the scan has one chunk of every document.
        with tape.inside("gdn states"), tape.standing_for(len(widths) / count):
            states, state = _scan(program, transition, write, state, size)
        with tape.standing_for(times):
            copied = op.copy(tape, read)
            shape = (size * n, chunk, d)
            outputs.append(op.matmul(tape, copied, states, shape, d, plus=own))
        del copied, states, transition, write, read, own
    output = op.cat(tape, outputs, (count * n, chunk, d))
    del outputs, parts
    return op.cast(tape, op.copy(tape, output, shape=(tokens, n, d)), narrow)


def _maps(program: Program, chunks: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every chunk as an affine map: transition and write ``[N·n, d, d]``, read and own ``[N·n, C, d]``."""
    tape, (q, k, v, log_alpha, beta) = program.tape, chunks
    count, chunk, d = q.shape
    rows = (count, chunk)

    g = op.unary(tape, log_alpha)
    if g.shape[-1] == 1:
        products = _products_by_head(program, k, g)
    else:
        products = _products_by_channel(program, k, g)
    grown = op.unary(tape, g, save="out")

    attention = op.multiply(tape, products(k), beta)
    both = op.multiply(tape, beta, grown)
    right = op.cat(tape, [op.multiply(tape, k, both), op.multiply(tape, v, beta)], (*rows, 2 * d))
    solved = _solve(program, attention, right)
    del right

    ends = op.unary(tape, op.unary(tape, g), save="out")
    to_end = op.multiply(tape, k, ends)
    copied = op.copy(tape, to_end, shape=(count, d, chunk))
    pushed = op.matmul(tape, copied, solved, (count, d, 2 * d), chunk)
    del copied
    left, write = op.split(tape, pushed, [(count, d, d)] * 2)
    last = op.narrow(tape, grown, (count, 1, g.shape[-1]))
    kept = op.unary(tape, last, shape=(count, d, d), same_gradient=True)
    transition = op.add(tape, kept, left)
    del kept

    scaled = op.unary(tape, q)
    read_out = op.matmul(tape, products(scaled), solved, (*rows, 2 * d), chunk)
    left, own = op.split(tape, read_out, [(*rows, d)] * 2)
    read = op.add(tape, op.multiply(tape, scaled, grown), left)
    return transition, write, read, own


def _products_by_head(program: Program, k: Tensor, g: Tensor) -> Callable[[Tensor], Tensor]:
    """X Kᵀ ∘ Γ with one decay for each head."""
    tape, (count, chunk, d) = program.tape, k.shape
    square = (count, chunk, chunk)
    gap = op.unary(tape, op.add(tape, g, Tensor(None, square, 0)))
    decay = op.unary(tape, gap, save="out")
    return lambda x: op.multiply(tape, _copied_matmul(program, x, k, square, d), decay)


def _products_by_channel(program: Program, k: Tensor, g: Tensor) -> Callable[[Tensor], Tensor]:
    """The same with a decay for each channel: pairs within a block, then keys before each block."""
    tape, (count, chunk, d) = program.tape, k.shape
    block = min(MIN_CHUNK, chunk)
    pairs, part = (count * chunk, block, d), (count, block, d)
    gaps = op.unary(tape, op.add(tape, g, Tensor(None, pairs, 0)))
    near = op.multiply(tape, k, op.unary(tape, gaps, save="out"))
    del gaps
    far, since = [], []
    for start in range(block, chunk, block):
        reference = op.narrow(tape, g, (count, 1, d))
        before = (count, start, d)
        gap = op.add(tape, reference, op.narrow(tape, g, before))
        weight = op.unary(tape, gap, save="out")
        far.append(op.multiply(tape, op.narrow(tape, k, before), weight))
        gap = op.add(tape, op.narrow(tape, g, part), reference)
        since.append(op.unary(tape, gap, save="out"))
        del gap, weight

    def products(x: Tensor) -> Tensor:
        own = op.matmul(tape, x, near, (count * chunk, 1, block), d)
        blocks = [
            op.copy(tape, op.narrow(tape, own, (count, block, block)), shape=(count, block, chunk))
        ]
        for index, (weight, earlier) in enumerate(zip(since, far, strict=True), start=1):
            rows = op.multiply(tape, op.narrow(tape, x, part), weight)
            first, second = op.copy(tape, rows), op.copy(tape, earlier)
            crossing = op.matmul(tape, first, second, (count, block, index * block), d)
            ours = op.narrow(tape, own, (count, block, block))
            joined = op.cat(tape, [crossing, ours], (count, block, (index + 1) * block))
            blocks.append(op.copy(tape, joined, shape=(count, block, chunk)))
        return op.cat(tape, blocks, (count, chunk, chunk))

    return products


def _to_chunks(program: Program, x: Tensor, head: tuple[int, int, int]) -> Tensor:
    """``[T, n, c]`` → ``[N·n, C, c]``; a view if chunks are exactly the stream."""
    tape, (count, n, chunk) = program.tape, head
    channels = x.shape[2] if len(x.shape) == 3 else 1
    x = op.cast(tape, x, op.WIDE)
    if count * chunk != x.shape[0]:  # a zero row as padding, then a gather
        padded = op.copy(tape, x, shape=(x.shape[0] + 1, n, channels))
        x = op.copy(tape, padded, shape=(count * chunk, n, channels))
        del padded
    return op.view(tape, x, (count * n, chunk, channels))


def _copied_matmul(
    program: Program, a: Tensor, b: Tensor, shape: tuple[int, ...], d: int
) -> Tensor:
    """``a @ bᵀ`` of permuted tensors; a batched product first copies them and then saves the copies."""
    tape = program.tape
    first, second = op.copy(tape, a), op.copy(tape, b)
    return op.matmul(tape, first, second, shape, d)


def _solve(program: Program, attention: Tensor, right: Tensor) -> Tensor:
    """``solve_triangular``: keeps matrix and solution."""
    tape = program.tape
    out = tape.empty(right.shape, right.size)
    chunks, chunk, columns = right.shape
    flops = float(chunks * chunk * chunk * columns)
    tape.compute("solve", flops, float(attention.nbytes + 2 * out.nbytes))
    saved = list(op.hold(attention, out))
    a_shape, r_shape, moved = attention.shape, right.shape, attention.nbytes + 2.0 * out.nbytes

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        by_right = tape.empty(r_shape, op.WIDE)
        tape.compute("solve", flops, moved)
        product = tape.empty(a_shape, op.WIDE)
        tape.compute("matmul", 2.0 * flops, moved)
        negative = tape.empty(a_shape, op.WIDE)
        by_matrix = tape.empty(a_shape, op.WIDE)
        tape.touch(product, negative, negative, by_matrix)
        del product, negative
        saved.clear()
        return [by_matrix, by_right]

    tape.record([attention, right], [out], backward)
    return out


def _scan(
    program: Program, transition: Tensor, write: Tensor, state: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """States that enter the chunks of a group ``[N·n, d, d]``, and the state that leaves it."""
    tape, (n, d, _) = program.tape, state.shape
    strides = min(count, MOST_STRIDES)
    steps = [count * (i + 1) // strides - count * i // strides for i in range(strides)]
    shapes = [(step * n, d, d) for step in steps]
    transitions, writes = op.split(tape, transition, shapes), op.split(tape, write, shapes)
    entering = []
    for step, shape, map_, own in zip(steps, shapes, transitions, writes, strict=True):
        entering.append(Tensor(state.storage, shape, op.WIDE, state.edge))
        state = op.matmul(tape, map_, entering[-1], shape, d, plus=own, launches=step)
    return op.cat(tape, entering, (count * n, d, d)), Tensor(
        state.storage, (n, d, d), op.WIDE, state.edge
    )


def _exchange(program: Program, transition: Tensor, write: Tensor, count: int, n: int) -> Tensor:
    """The state that enters the shard: its own map, chunk by chunk, and the gather of all shards' maps."""
    tape, d = program.tape, transition.shape[-1]
    maps, own = op.copy(tape, transition), op.copy(tape, write)
    shape = ((count - 1) * n, d, d)
    states = op.matmul(tape, maps, own, shape, d, plus=own, launches=count - 1)
    products = op.matmul(tape, maps, maps, shape, d, launches=count - 1)
    entering, (sent, sent_back) = tape.empty((n, d, d), op.WIDE), _exchange_bytes(program, n)
    tape.send("state", "context", sent)
    kept = 2 * program.rank.cp * entering.nbytes if sent > sent_back else 0  # transitions
    gathered = [Storage(tape, kept)]

    def backward(grads: list[Tensor | None]) -> list[Tensor | None]:
        gathered.clear()
        tape.send("state", "context", sent_back)
        return [Tensor(None, shape, op.WIDE), Tensor(None, shape, op.WIDE)]

    tape.record([states, products], [entering], backward)
    return entering
