"""Causal effects of query heads by denoising (clean outputs in the corrupted run), batched over heads and
prompts.

The paper's effects (corrupted outputs in the clean run) are in :mod:`megatron_hydra.selection.noising`. All
functions take one batch of prompt pairs and return the span readout m *after* the intervention, in float64 on
the CPU. :mod:`megatron_hydra.selection.effects` normalises it. "Frozen" means: at its value in the corrupted
run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from megatron_hydra.selection.prompts import PromptBatch
from megatron_hydra.selection.runner import DecoderRunner, LayerState, PairedStreams

Head = tuple[int, int]
"""(layer, query head)."""

PATHS = ("q", "k", "v", "qkv")
"""Inputs of the receivers through which a sender acts: each alone, and all three together."""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Results of both runs without intervention.

    Attributes:
        clean, corrupted: m of the two runs, ``[P]``.
        solved: whether every token of the answer is the clean run's most likely one, ``[P]`` bool.
    """

    clean: torch.Tensor
    corrupted: torch.Tensor
    solved: torch.Tensor


@torch.no_grad()
def baseline(runner: DecoderRunner, batch: PromptBatch) -> Baseline:
    """Run both prompts of every pair without intervention."""
    x = PairedStreams(runner, batch).finish()
    clean, corrupted = runner.readout(x.unflatten(0, (2, -1)), runner.readout_direction(batch))
    top = runner.logits(_clean(x)).argmax(-1).cpu()
    right = (top == batch.answer) | (batch.weights == 0)
    return Baseline(_result(clean), _result(corrupted), right.all(-1))


@torch.no_grad()
def direct_effects(runner: DecoderRunner, batch: PromptBatch) -> torch.Tensor:
    """Direct effect of each head's clean output on the logits, with all later layers frozen.

    Only the change of the head's o_proj output is added to the final residual stream. The final norm and the LM
    head are then applied exactly. All heads together need two forwards.

    Returns:
        m, ``[L, H, P]``.
    """
    streams = PairedStreams(runner, batch)
    contributions = []
    for layer in range(runner.num_layers):
        change = _clean_minus_corrupted(streams.at_answer(streams.advance().z))
        weights = runner.head_output_weights(layer, range(runner.num_heads)).float()
        contributions.append(
            torch.einsum("pahd,hdD->hpaD", change.float(), weights).to(runner.last_device)
        )
    frozen = _corrupted(streams.at_answer(streams.x)).float()
    direction = runner.readout_direction(batch)
    return torch.stack(
        [_result(runner.readout(frozen + delta, direction)) for delta in contributions]
    )


@torch.no_grad()
def total_effects(
    runner: DecoderRunner,
    batch: PromptBatch,
    heads: Sequence[Head],
    tokens_per_batch: int,
) -> Iterator[tuple[int, list[int], torch.Tensor]]:
    """Replace each head's output by its clean one at all positions; all later layers are recomputed.

    The streams are computed once. A patched run starts in the patched layer, at the first position where the
    prompts differ. As many heads as possible run together.

    Args:
        heads: heads to patch.
        tokens_per_batch: maximum number of positions of patched streams at a time.

    Yields:
        layer, its patched heads (ascending), m ``[n, P]``; layers ascending.
    """
    streams = PairedStreams(runner, batch)
    direction = runner.readout_direction(batch)
    tokens = streams.num_prompts * len(streams.positions)
    together = max(1, tokens_per_batch // tokens)
    for layer in range(max(layer for layer, _ in heads) + 1):
        state = streams.advance()
        wanted = sorted(h for at, h in heads if at == layer)
        results = [
            _patched_runs(runner, streams, state, layer, wanted[i : i + together], direction)
            for i in range(0, len(wanted), together)
        ]
        if results:
            yield layer, wanted, torch.cat(results)


@torch.no_grad()
def layer_effects(runner: DecoderRunner, batch: PromptBatch) -> torch.Tensor:
    """Replace the outputs of all heads of a layer by the clean ones; all later layers are recomputed.

    Returns:
        m, ``[L, P]``.
    """
    streams = PairedStreams(runner, batch)
    direction = runner.readout_direction(batch)
    results = []
    for layer in range(runner.num_layers):
        state = streams.advance()
        weights = runner.head_output_weights(layer, range(runner.num_heads))
        delta = torch.einsum("pthd,hdD->ptD", _clean_minus_corrupted(state.z), weights)
        x = streams.continue_from(layer, _corrupted(state.x_mid) + delta)
        results.append(_result(runner.readout(x, direction)))
    return torch.stack(results)


def _patched_runs(
    runner: DecoderRunner,
    streams: PairedStreams,
    state: LayerState,
    layer: int,
    heads: list[int],
    direction: torch.Tensor,
) -> torch.Tensor:
    change = _clean_minus_corrupted(state.z)[:, :, heads]
    delta = torch.einsum("pthd,hdD->hptD", change, runner.head_output_weights(layer, heads))
    patched = (_corrupted(state.x_mid) + delta).flatten(0, 1)
    x = streams.continue_from(layer, patched).unflatten(0, (len(heads), -1))
    return _result(runner.readout(x, direction))


# -- path patching --------------------------------------------------------------------------------


@dataclasses.dataclass
class _ReceiverLayer:
    """The n receivers of one layer, and their values in the corrupted run for comparison."""

    layer: int
    heads: list[int]
    kv_heads: list[int]  # KV head of each receiver
    x_in: torch.Tensor  # [P, T', D]
    q: torch.Tensor  # at the answer, [P, A, n, d]
    k: torch.Tensor  # [P, T, n, d]
    v: torch.Tensor
    z: torch.Tensor  # at the answer, [P, A, n, d]


@torch.no_grad()
def path_effects(
    runner: DecoderRunner,
    batch: PromptBatch,
    sender_layers: Sequence[int],
    receivers: Sequence[Head],
    tokens_per_batch: int,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Path patching: sender → q, k or v inputs of the receivers → logits.

    A sender's clean output changes the residual stream only by its o_proj output; all other heads and all MLPs
    between are frozen. Only the receivers read this change, in their queries, keys or values. The receivers'
    new outputs directly change the logits. So only the answer positions of a receiver matter.

    Args:
        sender_layers: all heads of these layers are senders.
        receivers: possible receivers; a receiver can read only senders in lower layers.
        tokens_per_batch: maximum number of positions of changed streams at a time.

    Yields:
        layer, m ``[4, H, P]`` in the order of :data:`PATHS`; layers ascending.
    """
    wanted = sorted(set(sender_layers))
    if not wanted:
        return
    streams = PairedStreams(runner, batch)
    direction = runner.readout_direction(batch)
    changes, stages = {}, []
    for layer in range(runner.num_layers):
        state = streams.advance()
        if layer in wanted:
            changes[layer] = _clean_minus_corrupted(state.z)
        heads = sorted(h for at, h in receivers if at == layer)
        if heads and layer > wanted[0]:
            stages.append(_receiver_layer(streams, state, layer, heads))
    frozen = _corrupted(streams.at_answer(streams.x)).float()
    together = max(1, tokens_per_batch // (streams.num_prompts * len(streams.positions)))
    for sender in wanted:
        above = [stage for stage in stages if stage.layer > sender]
        parts = []
        for first in range(0, runner.num_heads, together):
            heads = list(range(runner.num_heads))[first : first + together]
            weights = runner.head_output_weights(sender, heads)
            delta = torch.einsum("pthd,hdD->hptD", changes[sender][:, :, heads], weights)
            written = torch.zeros(len(PATHS), len(heads), *frozen.shape, device=frozen.device)
            for stage in above:
                written += _changed_outputs(runner, streams, stage, delta).to(written.device)
            parts.append(_result(runner.readout(frozen + written, direction)))
        yield sender, torch.cat(parts, dim=1)


def _receiver_layer(
    streams: PairedStreams, state: LayerState, layer: int, heads: list[int]
) -> _ReceiverLayer:
    kv_heads = [head // streams.runner.group_size for head in heads]
    return _ReceiverLayer(
        layer=layer,
        heads=heads,
        kv_heads=kv_heads,
        x_in=_corrupted(state.x_in),
        q=streams.at_answer(_corrupted(state.q))[:, :, heads],
        k=_corrupted(state.k)[:, :, kv_heads],
        v=_corrupted(state.v)[:, :, kv_heads],
        z=streams.at_answer(_corrupted(state.z))[:, :, heads],
    )


def _changed_outputs(
    runner: DecoderRunner, streams: PairedStreams, stage: _ReceiverLayer, delta: torch.Tensor
) -> torch.Tensor:
    """Outputs of one layer's receivers at the answer, changed by senders, ``[4, n, P, A, D]`` float32.

    Args:
        delta: the senders' changes of the residual stream, ``[n, P, T', D]``.
    """
    count, layer = delta.shape[0], stage.layer
    delta = delta.to(stage.x_in.device)
    normed = runner.attention_input(layer, (stage.x_in + delta).flatten(0, 1))
    k, v = streams.with_prefix(
        layer,
        runner.keys(layer, normed, streams.positions),
        runner.values(layer, normed),
    )
    # Only the receivers have queries here, so only the KV heads that they read are compared.
    k, v = k[:, :, stage.kv_heads], v[:, :, stage.kv_heads]
    answer = streams.answer_positions(count, delta.device)
    q = runner.queries(layer, streams.at_answer(normed), answer, stage.heads)
    old_q, old_k, old_v = (t.repeat(count, 1, 1, 1) for t in (stage.q, stage.k, stage.v))
    weights = runner.head_output_weights(layer, stage.heads).float()
    written = []
    for queries, keys, values in (
        (q, old_k, old_v),
        (old_q, k, old_v),
        (old_q, old_k, v),
        (q, k, v),
    ):
        z = runner.attend(layer, queries, keys, values, answer, grouped=False)
        change = (z.unflatten(0, (count, -1)) - stage.z).float()
        written.append(torch.einsum("npahd,hdD->npaD", change, weights))
    return torch.stack(written)


# -- first order ----------------------------------------------------------------------------------


def attribution_effects(runner: DecoderRunner, batch: PromptBatch) -> torch.Tensor:
    """Attribution patching: first-order estimate of the total effect of every head.

    The estimate is (z_clean − z_corrupted) · ∂m/∂z at the corrupted run, summed over positions. One forward of
    both streams and one backward give all heads.

    Returns:
        m of the corrupted run plus the estimate, ``[L, H, P]``.
    """
    streams = PairedStreams(runner, batch)
    count = streams.num_prompts
    probes, states_z = [], []
    for layer in range(runner.num_layers):
        shape = (2 * count, len(streams.positions), runner.num_heads, runner.head_dim)
        dtype = streams.x.dtype
        probe = torch.zeros(shape, device=runner.device_of(layer), dtype=dtype, requires_grad=True)
        states_z.append(streams.advance(probe).z.detach())
        probes.append(probe)
    x = _corrupted(streams.at_answer(streams.x))
    m = runner.readout(x, runner.readout_direction(batch))
    # Rows of a batch are independent, so the gradient of the sum contains the gradient of every prompt.
    gradients = torch.autograd.grad(m.sum(), probes)
    estimates = [
        (_clean_minus_corrupted(z).float() * _corrupted(g).float()).sum((1, 3)).T
        for z, g in zip(states_z, gradients, strict=True)
    ]
    return torch.stack([_result(m + estimate.to(m.device)) for estimate in estimates])


# -- attention mass --------------------------------------------------------------------------------


@torch.no_grad()
def attention_mass(runner: DecoderRunner, batch: PromptBatch) -> torch.Tensor:
    """Retrieval score of Wu et al. (arXiv 2404.15574): attention of a head to the token to copy.

    It is the attention mass from the first answer position to earlier occurrences of the answer's first token
    in the clean prompt, ``[L, H, P]``. It is NaN for prompts whose answer does not occur in their context.
    """
    streams = PairedStreams(runner, batch)
    length = batch.clean.shape[1]
    before = torch.arange(length) <= batch.answer_positions[:, :1]
    copied = (batch.clean == batch.answer[:, :1]) & before
    rows = []
    for layer in range(runner.num_layers):
        state = streams.advance()
        q = streams.at_answer(state.q)[: len(batch.index), 0].float()
        k = _clean(state.k).float().repeat_interleave(runner.group_size, 2)
        scores = torch.einsum("phd,pthd->hpt", q, k) * runner.layers[layer].self_attn.scaling
        scores = scores.masked_fill(~before.to(q.device), -torch.inf)
        mass = (scores.softmax(-1) * copied.to(q.device)).sum(-1)
        rows.append(_result(mass))
    masses = torch.stack(rows)
    masses[:, :, ~copied.any(-1)] = torch.nan
    return masses


def _clean(x: torch.Tensor) -> torch.Tensor:
    return x[: x.shape[0] // 2]


def _corrupted(x: torch.Tensor) -> torch.Tensor:
    return x[x.shape[0] // 2 :]


def _clean_minus_corrupted(x: torch.Tensor) -> torch.Tensor:
    return _clean(x) - _corrupted(x)


def _result(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double().cpu()
