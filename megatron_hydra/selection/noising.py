"""The paper's causal effects of query heads: outputs of the corrupted run replace those of the clean run
("noising").

HydraHead, equations 10 and 11. In every intervention the residual stream and the MLPs are recomputed. Outputs
of attention heads keep their clean values, except for the heads named below. All functions take one batch of
prompt pairs and return the *decrease* of the span readout, m(x) − m(x; patched), in float64 on the CPU.
:mod:`megatron_hydra.selection.importance` divides it by m(x) − m(x').

The effects are cheap, because later attention is frozen and a change of the stream stays at its position. A
head's direct effect therefore needs only one row of the stream per answer position, through all later MLPs.
All heads of all layers pass through them together. Only the inputs of a receiver need all positions.
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
    """Direct effects (equation 10): each head's corrupted output in the clean run, with all later attention
    outputs at their clean values.

    Args:
        rows_per_pass: maximum number of rows of the stream per pass of an MLP.

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
            rows = x_mid[None]  # the unpatched run for all comparisons, with the same arithmetic
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
    """Heads of one layer that react to a changed stream.

    Attributes:
        heads: indices of n heads.
        kv_heads: the KV heads that they read.
        reads: for each head the index of its KV head in ``kv_heads``.
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
    """Path patching by one step (equation 11): corrupt only the path from a candidate to the newest receivers.

    The first run gives the inputs of the newest receivers. It is the clean run with the candidate's corrupted
    output; all other attention has its clean values, and MLPs are recomputed. The second run is the clean run
    with the outputs of these receivers for the changed inputs, but with the candidate's clean output. In this
    run, receivers of earlier rounds are recomputed: they read the outputs of the newest receivers and pass the
    change on. All other heads keep their clean outputs.

    Args:
        senders: the candidates.
        newest: heads found in the last round.
        older: heads found before. If empty (first round), only the answer positions of a receiver matter.
        tokens_per_batch: maximum number of positions of changed streams at a time.

    Yields:
        layer, its candidates (ascending), m(x) − m(x; patched) ``[n, P]``; layers ascending. Layers without a
        newest receiver above them are omitted.
    """
    top = max((layer for layer, _ in newest), default=0)
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(set(senders)):
        if layer < top:
            by_layer.setdefault(layer, []).append(head)
    if not by_layer:
        return
    paths = _Paths(runner, batch, list(by_layer), newest, older)
    # Always from the first layer, for any candidates: the result of one must not depend on the others.
    # Otherwise a map would depend on the distribution of work over ranks.
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
    """The clean run, stored so that it can be changed at any layer.

    Attributes:
        added: output of the attention in the clean run, by layer, ``[P, T', D]``.
        x_mid: the clean stream after the attention of the layers at which a changed stream begins.
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
                if heads and layer:  # heads of the first layer have no senders
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
        """The readout if the receivers read one corrupted head of a layer at a time, ``[n, P]``.

        Args:
            heads: the heads; ``None``: nothing is corrupted, ``[1, P]``.
        """
        runner = self.runner
        heard = self._changed_stream(
            sender, heads
        )  # input stream of the newest receivers, [nP, T', D]
        answered: torch.Tensor | None = None  # stream with their outputs, [nP, T' or A, D]
        for layer in range(sender + 1, runner.num_layers):
            here = runner.device_of(layer)
            # Recomputed heads above read keys and values at all positions.
            wide = layer < self.last_live
            written: list[torch.Tensor] = []
            if layer in self.newest:
                written.append(self._output_change(self.newest[layer], heard.to(here), wide))
            if answered is not None and layer in self.older:
                written.append(self._output_change(self.older[layer], answered.to(here), wide))
            if answered is not None:
                if not wide and answered.shape[1] == len(self.streams.positions):
                    answered = self._at_answers(answered)
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

    def _changed_stream(self, layer: int, heads: list[int] | None) -> torch.Tensor:
        """The clean stream after a layer with one corrupted head, ``[nP, T', D]``."""
        if heads is None:
            return self.runner.add_mlp(layer, self.x_mid[layer])
        weights = self.runner.head_output_weights(layer, heads)
        delta = torch.einsum("pthd,hdD->hptD", self.change[layer][:, :, heads], weights)
        return self.runner.add_mlp(layer, (self.x_mid[layer] + delta).flatten(0, 1))

    def _at_answers(self, x: torch.Tensor) -> torch.Tensor:
        """The answer positions in float32, because small changes matter; there are few of these rows."""
        return self.streams.at_answer(x).float()

    def _with_clean(self, x: torch.Tensor, clean: torch.Tensor, wide: bool) -> torch.Tensor:
        """Add ``clean``, ``[P, T', D]``, of the clean run to every changed stream."""
        clean = clean if wide else self._at_answers(clean)
        return (x.unflatten(0, (-1, self.streams.num_prompts)) + clean).flatten(0, 1)

    def _output_change(self, receivers: _Heads, x: torch.Tensor, wide: bool) -> torch.Tensor:
        """Change of the output of one layer's receivers if they read ``x`` instead of the clean stream.

        Args:
            x: ``[nP, T', D]``: keys and values need all positions.
            wide: compute all T' positions, else only the answer positions.

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
