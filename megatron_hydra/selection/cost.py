"""Cost of the parts of a selection, in floating-point operations.

A unit of work is worth what it computes, so that the time left of one kind of unit can be told from the
time that another kind took: the prefix that clean and corrupted prompt share is computed once and counted
once, attention grows with the keys it sees, and a patched run costs the layers that come after the patch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from megatron_hydra.selection.prompts import PromptBatch
from megatron_hydra.selection.runner import DecoderRunner


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The size of a batch of prompt pairs.

    Attributes:
        pairs: P.
        prefix: tokens at the start that both prompts share.
        rest: T', those after it.
        span: A, tokens of an answer.
    """

    pairs: int
    prefix: int
    rest: int
    span: int = 1

    @classmethod
    def of(cls, batch: PromptBatch) -> Tokens:
        """The size of a batch."""
        prefix = batch.shared_prefix
        rest = batch.clean.shape[1] - prefix
        return cls(len(batch.index), prefix, rest, batch.answer.shape[1])

    @property
    def length(self) -> int:
        """T, the length of a prompt."""
        return self.prefix + self.rest


@dataclasses.dataclass(frozen=True)
class DecoderCost:
    """Operations of a decoder's parts; a multiplication and an addition are two.

    Attributes:
        layers, query_heads, kv_heads, head_dim, hidden, mlp, vocabulary: the model's shape.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    mlp: int
    vocabulary: int

    @classmethod
    def of(cls, runner: DecoderRunner) -> DecoderCost:
        """The shape of a loaded model."""
        config = runner.model.config
        return cls(
            runner.num_layers,
            runner.num_heads,
            runner.num_kv_heads,
            runner.head_dim,
            runner.hidden_size,
            config.intermediate_size,
            config.vocab_size,
        )

    # -- parts of a forward ------------------------------------------------------------------------

    @property
    def _mlp(self) -> float:
        return 6.0 * self.hidden * self.mlp

    @property
    def _keys_and_values(self) -> float:
        return 4.0 * self.hidden * self.kv_heads * self.head_dim

    @property
    def _one_head_out(self) -> float:
        return 2.0 * self.head_dim * self.hidden

    def _layer(self, rows: float, keys: int) -> float:
        """One layer on ``rows`` tokens that see ``keys`` positions."""
        heads = self.query_heads * self.head_dim
        projections = 4.0 * self.hidden * heads + self._keys_and_values
        return rows * (projections + self._mlp + 4.0 * heads * keys)

    def prefix(self, tokens: Tokens) -> float:
        """What clean and corrupted prompts share, through all layers."""
        return self.layers * self._layer(tokens.pairs * tokens.prefix, tokens.prefix)

    def _both_rests(self, tokens: Tokens) -> float:
        return self.layers * self._layer(2 * tokens.pairs * tokens.rest, tokens.length)

    # -- units of work -----------------------------------------------------------------------------

    def streams(self, tokens: Tokens) -> float:
        """Both residual streams of a batch through all layers."""
        return self.prefix(tokens) + self._both_rests(tokens)

    def baseline(self, tokens: Tokens) -> float:
        """Both runs, and the clean one's logits of all tokens at the answer."""
        return (
            self.streams(tokens) + 2.0 * tokens.pairs * tokens.span * self.hidden * self.vocabulary
        )

    def attribution(self, tokens: Tokens) -> float:
        """A forward, and a backward to the head outputs: weights have no gradient."""
        return self.prefix(tokens) + 2 * self._both_rests(tokens)

    def patched(self, tokens: Tokens, layer: int, runs: float) -> float:
        """Runs that are patched in the middle of a layer, from there to the end, and both streams through
        that layer.

        What is computed once for all layers is :meth:`prefix`.
        """
        rows = runs * tokens.pairs * tokens.rest
        after = self.layers - 1 - layer
        forward = rows * self._one_head_out + (rows * self._mlp if after else 0.0)
        return (
            self._both_rests(tokens) / self.layers
            + forward
            + after * self._layer(rows, tokens.length)
        )

    def whole_layers(self, tokens: Tokens) -> float:
        """One patched run for every layer."""
        return self.prefix(tokens) + sum(
            self.patched(tokens, layer, 1) for layer in range(self.layers)
        )

    def clean_run(self, tokens: Tokens) -> float:
        """The clean prompts alone, from their first token."""
        return self.layers * self._layer(tokens.pairs * tokens.length, tokens.length)

    def receivers(self, tokens: Tokens) -> float:
        """Both streams, and a row at every answer position for every head through the MLPs that follow."""
        rows = self.query_heads * tokens.pairs * tokens.span
        mlps = self.layers * (self.layers + 1) / 2
        return self.streams(tokens) + rows * (self.layers * self._one_head_out + mlps * self._mlp)

    def senders(
        self,
        tokens: Tokens,
        layer: int,
        heads: float,
        newest: Mapping[int, int],
        older: Mapping[int, int],
    ) -> float:
        """Candidates of one layer, one at a time, to the newest receivers and through the older ones.

        What is computed once for all layers is :meth:`streams`.

        Args:
            heads: candidates.
            newest, older: how many receivers there are in a layer.
        """
        rows = heads * tokens.pairs * tokens.rest
        narrow = heads * tokens.pairs * tokens.span
        above = [at for at in newest if at > layer]
        if not above:
            return 0.0
        last_live = max(older, default=-1)
        whole = rows * self._one_head_out + rows * self._mlp * (max(above) - layer)
        for at in range(min(above), self.layers):
            wide = at < last_live
            whole += (rows if wide else narrow) * self._mlp
            for count in (newest.get(at, 0), older.get(at, 0) if at > min(above) else 0):
                asked = rows if wide else narrow
                # Keys and values of KV heads that are read: at most one for each receiver.
                read = min(count, self.kv_heads) / self.kv_heads * self._keys_and_values
                whole += rows * read + asked * count * (
                    2 * self._one_head_out + 4.0 * self.head_dim * tokens.length
                )
        return whole

    def paths(self, tokens: Tokens, receivers: Sequence[int]) -> float:
        """All senders of one layer to the receivers above it.

        What is computed once for all layers is :meth:`streams`.

        Args:
            receivers: how many there are in each layer above that has any.
        """
        rows = self.query_heads * tokens.pairs
        heard = rows * tokens.rest * self._one_head_out
        for count in receivers:
            # Four ways (q, k, v, all) at the answer alone: it is the keys and values that cost.
            attended = 16.0 * count * self.head_dim * tokens.length
            heard += rows * (tokens.rest * self._keys_and_values + attended)
        return heard
