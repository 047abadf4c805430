"""Cost of the parts of a selection, in floating-point operations.

The cost of a unit of work is its number of operations. So the time of one kind of unit gives an estimate for
another kind. The common prefix of clean and corrupted prompt is computed once and counted once. The cost of
attention grows with the number of keys. A patched run costs the layers after the patch.
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
        prefix: number of tokens at the start that both prompts share.
        rest: T', number of tokens after the prefix.
        span: A, number of tokens of an answer.
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
    """Operations of a decoder's parts; a multiplication and an addition count as two.

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
        """Cost of one layer for ``rows`` tokens that see ``keys`` positions."""
        heads = self.query_heads * self.head_dim
        projections = 4.0 * self.hidden * heads + self._keys_and_values
        return rows * (projections + self._mlp + 4.0 * heads * keys)

    def prefix(self, tokens: Tokens) -> float:
        """Cost of the common prefix of clean and corrupted prompts in all layers."""
        return self.layers * self._layer(tokens.pairs * tokens.prefix, tokens.prefix)

    def _both_rests(self, tokens: Tokens) -> float:
        return self.layers * self._layer(2 * tokens.pairs * tokens.rest, tokens.length)

    # -- units of work -----------------------------------------------------------------------------

    def streams(self, tokens: Tokens) -> float:
        """Cost of both residual streams of a batch in all layers."""
        return self.prefix(tokens) + self._both_rests(tokens)

    def baseline(self, tokens: Tokens) -> float:
        """Cost of both runs, and of the clean run's logits at the answer."""
        return (
            self.streams(tokens) + 2.0 * tokens.pairs * tokens.span * self.hidden * self.vocabulary
        )

    def attribution(self, tokens: Tokens) -> float:
        """Cost of a forward, and a backward to the head outputs: weights have no gradient."""
        return self.prefix(tokens) + 2 * self._both_rests(tokens)

    def patched(self, tokens: Tokens, layer: int, runs: float) -> float:
        """Cost of runs patched in a layer, from there to the end, and of both streams in that layer.

        :meth:`prefix` is the part that is computed once for all layers.
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
        """Cost of one patched run for every layer."""
        return self.prefix(tokens) + sum(
            self.patched(tokens, layer, 1) for layer in range(self.layers)
        )

    def clean_run(self, tokens: Tokens) -> float:
        """Cost of the clean prompts, from their first token."""
        return self.layers * self._layer(tokens.pairs * tokens.length, tokens.length)

    def receivers(self, tokens: Tokens) -> float:
        """Cost of both streams, and of a row per head and answer position through all later MLPs."""
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
        """Cost of the candidates of one layer, one at a time, to the newest and through the older receivers.

        :meth:`streams` is the part that is computed once for all layers.

        Args:
            heads: number of candidates.
            newest, older: layer -> number of receivers.
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
                # Keys and values of the KV heads that receivers read: at most one per receiver.
                read = min(count, self.kv_heads) / self.kv_heads * self._keys_and_values
                whole += rows * read + asked * count * (
                    2 * self._one_head_out + 4.0 * self.head_dim * tokens.length
                )
        return whole

    def paths(self, tokens: Tokens, receivers: Sequence[int]) -> float:
        """Cost of all senders of one layer to the receivers above it.

        :meth:`streams` is the part that is computed once for all layers.

        Args:
            receivers: number of receivers in each layer above that has any.
        """
        rows = self.query_heads * tokens.pairs
        heard = rows * tokens.rest * self._one_head_out
        for count in receivers:
            # Four paths (q, k, v, all) at the answer only: keys and values dominate the cost.
            attended = 16.0 * count * self.head_dim * tokens.length
            heard += rows * (tokens.rest * self._keys_and_values + attended)
        return heard
