"""The paper's causal effects of query heads: the corrupted run's output put into the clean run ("noising").

HydraHead, equations 10 and 11. In every intervention the residual stream and the MLPs run live, and the
outputs of attention heads keep their clean values, but for those that are named. All functions take one
batch of prompt pairs and return by how much the span readout m *falls*, m(x) − m(x; patched), in
float64 on the CPU; :mod:`megatron_hydra.selection.importance` divides that by m(x) − m(x').

What makes them cheap: as later attention is frozen, a change of the stream stays at its position. So a
head's direct effect needs only the answer positions, one row of the stream each, through the MLPs that
follow: all heads of all layers go through them together. Only what a receiver *hears* needs all positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from megatron_hydra.selection.patching import Head
from megatron_hydra.selection.prompts import PromptBatch
from megatron_hydra.selection.runner import DecoderRunner, LayerState, PairedStreams


@torch.no_grad()
def receiver_falls(
    runner: DecoderRunner, batch: PromptBatch, rows_per_pass: int = 8192
) -> torch.Tensor:
    """Direct effects (equation 10): each head's corrupted output in the clean run, all later attention
    outputs at their clean values.

    Args:
        rows_per_pass: at most this many rows of the stream go through an MLP at a time.

    Returns:
        m(x) − m(x; patched), ``[L, H, P]``.
    """
    streams = PairedStreams(runner, batch)
    direction = runner.readout_direction(batch)
    rows = torch.empty(0)
    for layer in range(runner.num_layers):
        state = streams.advance()
        x_mid = streams.at_answer(_clean(state.x_mid)).float()
        change = streams.at_answer(_corrupted_minus_clean(state.z)).float()
        weights = runner.head_output_weights(layer, range(runner.num_heads)).float()
        patched = x_mid + torch.einsum("pahd,hdD->hpaD", change, weights)
        if layer == 0:
            rows = x_mid[None]  # the unpatched run, which all are compared with: same arithmetic
        else:
            rows = rows.to(x_mid.device) + (x_mid - streams.at_answer(_clean(state.x_in)).float())
        rows = torch.cat([rows, patched])
        pieces = rows.flatten(0, 2).split(max(1, rows_per_pass))
        rows = torch.cat([runner.add_mlp(layer, x) for x in pieces]).view(rows.shape)
    m = runner.readout(rows, direction)
    return _result(m[0] - m[1:]).unflatten(0, (runner.num_layers, runner.num_heads))


# -- senders --------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Heads:
    """Heads of one layer that answer to a changed stream.

    Attributes:
        heads: which, n of them.
        kv_heads: the KV heads that they read.
        reads: for each head, the place of its KV head in ``kv_heads``.
        z: their clean outputs at the T' positions, ``[P, T', n, d]``.
    """

    layer: int
    heads: list[int]
    kv_heads: list[int]
    reads: list[int]
    z: torch.Tensor

    @classmethod
    def of(cls, runner: DecoderRunner, layer: int, heads: list[int], state: LayerState) -> _Heads:
        kv_heads = sorted({head // runner.group_size for head in heads})
        reads = [kv_heads.index(head // runner.group_size) for head in heads]
        return cls(layer, heads, kv_heads, reads, _clean(state.z)[:, :, heads].clone())


@torch.no_grad()
def sender_falls(
    runner: DecoderRunner,
    batch: PromptBatch,
    senders: Sequence[Head],
    newest: Sequence[Head],
    older: Sequence[Head],
    tokens_per_batch: int,
) -> Iterator[tuple[int, list[int], torch.Tensor]]:
    """Path patching one step back (equation 11): only what a candidate sends to the newest receivers is
    corrupted.

    First, what they hear: the clean run with the candidate's corrupted output, all other attention at its
    clean values, MLPs live, up to the inputs of the newest receivers. Then, what that does: the clean run
    with these receivers' outputs as they answer to it, but without the candidate's own. Receivers of
    earlier rounds are live there: they hear what the newest write, and pass it on. All other heads keep
    their clean outputs.

    Args:
        senders: the candidates.
        newest: heads found in the last round.
        older: heads found before; empty in the first round. Then a receiver's answer positions alone matter.
        tokens_per_batch: at most this many positions of changed streams at a time.

    Yields:
        layer, its candidates (ascending), m(x) − m(x; patched) ``[n, P]``; layers ascending. Layers from which
        no newest receiver can be reached are omitted.
    """
    top = max((layer for layer, _ in newest), default=0)
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(set(senders)):
        if layer < top:
            by_layer.setdefault(layer, []).append(head)
    if not by_layer:
        return
    paths = _Paths(runner, batch, list(by_layer), newest, older)
    # From the first layer, whichever candidates there are: what is computed of one must not depend on the
    # others, or a map would depend on how the work is shared out.
    unpatched = paths.readout(0, None)
    width = paths.streams.num_prompts * len(paths.streams.positions)
    together = max(1, tokens_per_batch // width)
    for layer, heads in by_layer.items():
        parts = [
            unpatched - paths.readout(layer, heads[i : i + together])
            for i in range(0, len(heads), together)
        ]
        yield layer, heads, _result(torch.cat(parts))


class _Paths:
    """The clean run, kept so that it can be changed in the middle.

    Attributes:
        added: what attention adds to the clean stream, by layer, ``[P, T', D]``.
        x_mid: the clean stream after the attention of layers at which a changed stream begins.
        change: corrupted minus clean outputs of the senders' layers, ``[P, T', H, d]``.
        newest, older: receivers by layer.
    """

    def __init__(
        self,
        runner: DecoderRunner,
        batch: PromptBatch,
        sender_layers: list[int],
        newest: Sequence[Head],
        older: Sequence[Head],
    ) -> None:
        self.runner = runner
        self.streams = PairedStreams(runner, batch)
        self.direction = runner.readout_direction(batch)
        self.added: dict[int, torch.Tensor] = {}
        self.x_mid: dict[int, torch.Tensor] = {}
        self.change: dict[int, torch.Tensor] = {}
        self.newest: dict[int, _Heads] = {}
        self.older: dict[int, _Heads] = {}
        for layer in range(runner.num_layers):
            state = self.streams.advance()
            for receivers, kept in ((newest, self.newest), (older, self.older)):
                heads = sorted({h for at, h in receivers if at == layer})
                if heads and layer:  # those of the first layer hear nobody
                    kept[layer] = _Heads.of(runner, layer, heads, state)
            if layer in sender_layers:
                self.change[layer] = _corrupted_minus_clean(state.z)
            if not layer or layer in sender_layers or layer in self.newest:
                self.x_mid[layer] = _clean(state.x_mid).clone()
            if layer:
                self.added[layer] = _clean(state.x_mid) - _clean(state.x_in)
        self.last_heard = max(self.newest)
        self.last_live = max(self.older, default=-1)

    def readout(self, sender: int, heads: list[int] | None) -> torch.Tensor:
        """The readout if the receivers hear these heads of a layer corrupted, one at a time, ``[n, P]``.

        Args:
            heads: ``None``: nothing is corrupted, ``[1, P]``.
        """
        runner = self.runner
        heard = self._sent(sender, heads)  # the stream that the newest receivers read, [nP, T', D]
        answered: torch.Tensor | None = None  # the stream with their answers, [nP, T' or A, D]
        for layer in range(sender + 1, runner.num_layers):
            here = runner.device_of(layer)
            wide = layer < self.last_live  # live heads further up read keys and values everywhere
            written: list[torch.Tensor] = []
            if layer in self.newest:
                written.append(self._written(self.newest[layer], heard.to(here), wide))
            if answered is not None and layer in self.older:
                written.append(self._written(self.older[layer], answered.to(here), wide))
            if answered is not None:
                if not wide and answered.shape[1] == len(self.streams.positions):
                    answered = self._narrow(answered)
                answered = self._with_clean(answered.to(here), self.added[layer], wide)
            elif written:
                answered = self._with_clean(written.pop(), self.x_mid[layer], wide)
            if answered is not None:
                answered = runner.add_mlp(layer, sum(written, answered))
            if layer < self.last_heard:
                heard = self._with_clean(heard.to(here), self.added[layer], wide=True)
                heard = runner.add_mlp(layer, heard)
        assert answered is not None
        copies = (-1, self.streams.num_prompts)
        return runner.readout(answered.unflatten(0, copies), self.direction)

    def _sent(self, layer: int, heads: list[int] | None) -> torch.Tensor:
        """The clean stream after a layer in which one head is corrupted, ``[nP, T', D]``."""
        if heads is None:
            return self.runner.add_mlp(layer, self.x_mid[layer])
        weights = self.runner.head_output_weights(layer, heads)
        delta = torch.einsum("pthd,hdD->hptD", self.change[layer][:, :, heads], weights)
        return self.runner.add_mlp(layer, (self.x_mid[layer] + delta).flatten(0, 1))

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        """The answer positions, in float32: these rows are few, and small changes count."""
        return self.streams.at_answer(x).float()

    def _with_clean(self, x: torch.Tensor, clean: torch.Tensor, wide: bool) -> torch.Tensor:
        """Add what belongs to the clean run, ``[P, T', D]``, to every changed stream."""
        clean = clean if wide else self._narrow(clean)
        return (x.unflatten(0, (-1, self.streams.num_prompts)) + clean).flatten(0, 1)

    def _written(self, receivers: _Heads, x: torch.Tensor, wide: bool) -> torch.Tensor:
        """What changes in what receivers of one layer write, as they hear ``x`` instead of the clean stream.

        Args:
            x: ``[nP, T', D]``: keys and values are read everywhere.
            wide: at all T' positions, else at the answer positions.

        Returns:
            ``[nP, T' or A, D]``, float32 unless ``wide``.
        """
        runner, streams, layer = self.runner, self.streams, receivers.layer
        copies = x.shape[0] // streams.num_prompts
        normed = runner.attention_input(layer, x)
        positions = streams.positions.to(x.device)
        k, v = streams.with_prefix(
            layer,
            runner.keys(layer, normed, positions, receivers.kv_heads),
            runner.values(layer, normed, receivers.kv_heads),
            receivers.kv_heads,
        )
        k, v = k[:, :, receivers.reads], v[:, :, receivers.reads]
        before = receivers.z
        if not wide:
            normed, before = streams.at_answer(normed), streams.at_answer(before)
            positions = streams.answer_positions(copies, x.device)
        q = runner.queries(layer, normed, positions, receivers.heads)
        z = runner.attend(layer, q, k, v, positions, grouped=False)
        change = z - before.repeat(copies, 1, 1, 1)
        weights = runner.head_output_weights(layer, receivers.heads)
        if not wide:
            change, weights = change.float(), weights.float()
        return torch.einsum("bthd,hdD->btD", change, weights)


def _clean(x: torch.Tensor) -> torch.Tensor:
    return x[: x.shape[0] // 2]


def _corrupted_minus_clean(x: torch.Tensor) -> torch.Tensor:
    return x[x.shape[0] // 2 :] - _clean(x)


def _result(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double().cpu()
