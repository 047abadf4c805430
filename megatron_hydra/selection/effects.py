"""Effects of all heads on all capabilities: the chunks of work, and their normalisation."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.selection import patching
from megatron_hydra.selection.patching import Head
from megatron_hydra.selection.prompts import PromptBatch, PromptPair, make_batches
from megatron_hydra.selection.runner import DecoderRunner
from megatron_hydra.selection.work import Chunk, Result, WorkBench

BatchResult = Callable[[PromptBatch], Result]


@dataclasses.dataclass(frozen=True)
class Solved:
    """The prompts of one capability that the model solves.

    Attributes:
        pairs: all its pairs.
        keep: indices of the solved ones.
        clean, corrupted: m of the two runs for the solved ones, ``[P]`` float64.
    """

    pairs: list[PromptPair]
    keep: list[int]
    clean: np.ndarray
    corrupted: np.ndarray


class EffectEngine:
    """Measures effects, capability by capability.

    Args:
        runner: the model.
        bench: does the work.
        tokens_per_batch: positions computed at a time. It is part of what is computed (a matrix
            product's last bits depend on its size), so a resumed run must have the same.
    """

    def __init__(self, runner: DecoderRunner, bench: WorkBench, tokens_per_batch: int) -> None:
        self.runner, self.bench = runner, bench
        self.tokens_per_batch = tokens_per_batch

    def plan(self, name: str, pairs: list[PromptPair], stages: Sequence[str]) -> None:
        """Announce a capability's stages, so that the remaining time counts them from the start."""
        tokens = sum(_tokens(batch) for batch in make_batches(pairs, self._prompt_tokens))
        layers, heads = self._layers, self.runner.num_heads
        costs = {
            "baseline": 2.0 * layers,
            "direct": 2.0 * layers,
            "attention": 2.0 * layers,
            "attribution": 6.0 * layers,
            "layers": layers * (layers + 1) / 2,
            "total": heads * layers * (layers + 1) / 2,
            "paths": 0.3 * heads * layers * (layers - 1) / 2,
        }
        for stage in stages:
            self.bench.plan(f"{stage} {name}", tokens * costs[stage])

    # -- which prompts count -----------------------------------------------------------------------

    def solve(self, name: str, pairs: list[PromptPair], rule: str, minimum: int) -> Solved:
        """Drop the prompts that the model does not solve.

        Args:
            rule: ``top1``: the answer is the clean run's most likely token, and the corruption
                lowers its logit difference; ``pair``: the clean run prefers the answer, the
                corrupted run the wrong one; ``off``: keep all that the corruption lowers.
            minimum: fewer left is an error.

        Raises:
            HydraError: too few prompts left, with the counts.
        """

        def measure(batch: PromptBatch) -> Result:
            result = patching.baseline(self.runner, batch)
            return dataclasses.asdict(result)

        columns = self._over_batches(f"baseline {name}", pairs, None, measure, 2 * self._layers)
        clean, corrupted = columns["clean"].numpy(), columns["corrupted"].numpy()
        good = clean > corrupted
        if rule == "top1":
            good &= columns["solved"].numpy()
        elif rule == "pair":
            good &= (clean > 0) & (corrupted < 0)
        keep = np.flatnonzero(good)
        if len(keep) < minimum:
            raise HydraError(
                f"--tasks {name}: the model solves {len(keep)} of {len(pairs)} prompts, at least "
                f"{minimum} are needed; leave the task out, make it easier, give more prompts "
                "(--num-prompts), or lower --min-prompts"
            )
        return Solved(pairs, keep.tolist(), clean[keep], corrupted[keep])

    # -- all heads of one capability ---------------------------------------------------------------

    def direct(self, name: str, prompts: Solved) -> np.ndarray:
        """Normalised direct effects, ``[L, H]``."""
        return self._all_heads("direct", name, prompts, patching.direct_effects, 2 * self._layers)

    def attribution(self, name: str, prompts: Solved) -> np.ndarray:
        """Normalised first-order estimates of the total effects, ``[L, H]``."""
        return self._all_heads(
            "attribution", name, prompts, patching.attribution_effects, 6 * self._layers
        )

    def layers(self, name: str, prompts: Solved) -> np.ndarray:
        """Normalised effects of whole layers' attention, ``[L]``."""
        cost = self._layers * (self._layers + 1) // 2
        return self._all_heads("layers", name, prompts, patching.layer_effects, cost)

    def attention_mass(self, name: str, prompts: Solved) -> np.ndarray:
        """Mean retrieval score over the prompts whose answer occurs in them, ``[L, H]``.

        Raises:
            HydraError: no prompt's answer occurs in its context.
        """
        columns = self._over_batches(
            f"attention {name}",
            prompts.pairs,
            prompts.keep,
            lambda batch: {"mass": patching.attention_mass(self.runner, batch)},
            2 * self._layers,
        )
        mass = columns["mass"].numpy()
        usable = ~np.isnan(mass[0, 0])
        if not usable.any():
            raise HydraError(
                f"--tasks {name}: no answer occurs in its prompt, so attention_mass has nothing "
                "to look at; use a retrieval task, or the strategy interp"
            )
        return mass[:, :, usable].mean(-1)

    def total(self, name: str, prompts: Solved, heads: Sequence[Head] | None = None) -> np.ndarray:
        """Normalised total effects, ``[L, H]``; NaN for heads that were not asked for."""
        runner = self.runner
        wanted = heads or [(i, h) for i in range(self._layers) for h in range(runner.num_heads)]
        per_layer = {i: [h for at, h in wanted if at == i] for i in range(self._layers)}
        batches = make_batches(prompts.pairs, self._prompt_tokens, prompts.keep)
        chunks = [
            Chunk(
                f"total-{name}-b{b}-l{layer}-{_digest(heads_here)}",
                cost=_tokens(batch) * len(heads_here) * (self._layers - layer),
                batch=b,
                layer=layer,
            )
            for b, batch in enumerate(batches)
            for layer, heads_here in per_layer.items()
            if heads_here
        ]

        def compute(b: int, members: list[Chunk]) -> Iterator[tuple[Chunk, Result]]:
            by_layer = {c.layer: c for c in members}
            todo = [(layer, h) for layer in by_layer for h in per_layer[layer]]
            for layer, _, m in patching.total_effects(
                runner, batches[b], todo, self.tokens_per_batch
            ):
                yield by_layer[layer], {"m": m}

        results = self.bench.run(f"total {name}", chunks, compute)
        m = np.full((self._layers, runner.num_heads, len(prompts.pairs)), np.nan)
        for chunk in chunks:
            heads_here = sorted(per_layer[chunk.layer])
            columns = list(batches[chunk.batch].index)
            m[np.ix_([chunk.layer], heads_here, columns)] = results[chunk.key]["m"].numpy()
        return normalise(m[:, :, prompts.keep], prompts)

    def paths(self, name: str, prompts: Solved, receivers: Sequence[Head]) -> dict[str, np.ndarray]:
        """Normalised effects of every sender through the receivers' inputs: path -> ``[L, H]``."""
        runner = self.runner
        top = max((layer for layer, _ in receivers), default=0)
        receiver_layers = {layer for layer, _ in receivers}
        batches = make_batches(prompts.pairs, self._prompt_tokens, prompts.keep)
        chunks = [
            Chunk(
                f"path-{name}-b{b}-l{layer}-{_digest(receivers)}",
                cost=0.3
                * _tokens(batch)
                * runner.num_heads
                * sum(r > layer for r in receiver_layers),
                batch=b,
                layer=layer,
            )
            for b, batch in enumerate(batches)
            for layer in range(top)
        ]

        def compute(b: int, members: list[Chunk]) -> Iterator[tuple[Chunk, Result]]:
            by_layer = {c.layer: c for c in members}
            for layer, m in patching.path_effects(
                runner, batches[b], list(by_layer), receivers, self.tokens_per_batch
            ):
                yield by_layer[layer], {"m": m}

        results = self.bench.run(f"paths {name}", chunks, compute)
        # A head above all receivers has no path to them: its m is that of the corrupted run.
        shape = (len(patching.PATHS), self._layers, runner.num_heads, len(prompts.pairs))
        m = np.zeros(shape)
        m[..., prompts.keep] = prompts.corrupted
        for chunk in chunks:
            columns = list(batches[chunk.batch].index)
            m[:, chunk.layer][:, :, columns] = results[chunk.key]["m"].numpy()
        return {
            path: normalise(m[i][:, :, prompts.keep], prompts)
            for i, path in enumerate(patching.PATHS)
        }

    # -- helpers -----------------------------------------------------------------------------------

    @property
    def _layers(self) -> int:
        return self.runner.num_layers

    @property
    def _prompt_tokens(self) -> int:
        return prompt_tokens(self.tokens_per_batch, self.runner.num_heads)

    def _all_heads(
        self,
        kind: str,
        name: str,
        prompts: Solved,
        effect: Callable[[DecoderRunner, PromptBatch], torch.Tensor],
        cost: int,
    ) -> np.ndarray:
        columns = self._over_batches(
            f"{kind} {name}",
            prompts.pairs,
            prompts.keep,
            lambda batch: {"m": effect(self.runner, batch)},
            cost,
        )
        return normalise(columns["m"].numpy(), prompts)

    def _over_batches(
        self,
        stage: str,
        pairs: list[PromptPair],
        keep: list[int] | None,
        measure: BatchResult,
        cost: int,
    ) -> dict[str, torch.Tensor]:
        """``measure`` on every batch; prompts (the last axis) back in the order of ``keep``."""
        batches = make_batches(pairs, self._prompt_tokens, keep)
        chunks = [
            Chunk(f"{stage}-b{b}", cost=cost * _tokens(batch), batch=b)
            for b, batch in enumerate(batches)
        ]

        def compute(b: int, members: list[Chunk]) -> Iterator[tuple[Chunk, Result]]:
            for chunk in members:
                yield chunk, measure(batches[b])

        results = self.bench.run(stage, chunks, compute)
        order = np.argsort([i for batch in batches for i in batch.index])
        names = results[chunks[0].key]
        return {
            key: torch.cat([results[c.key][key] for c in chunks], dim=-1)[..., order]
            for key in names
        }


def normalise(m: np.ndarray, prompts: Solved) -> np.ndarray:
    """Logit differences to effects: 0 is the corrupted run, 1 the clean one.

    Numerator and denominator are averaged over prompts first, so that a prompt on which clean and
    corrupted hardly differ does not dominate.

    Args:
        m: after the intervention, ``[..., P]``.
    """
    gap = prompts.clean.mean() - prompts.corrupted.mean()
    return (m.mean(-1) - prompts.corrupted.mean()) / gap


def top_heads(scores: np.ndarray, count: int, share: float) -> list[Head]:
    """The ``count`` best heads whose score is at least ``share`` of the best; at least one."""
    order = np.argsort(-scores.reshape(-1), kind="stable")[: max(1, count)]
    best = scores.reshape(-1)[order[0]]
    heads = scores.shape[1]
    chosen = [i for i in order if scores.reshape(-1)[i] >= share * best] or [order[0]]
    return sorted((int(i) // heads, int(i) % heads) for i in chosen)


def prompt_tokens(tokens_per_batch: int, num_heads: int) -> int:
    """Clean and corrupted tokens in a batch of prompts: so few that a layer's heads run together.

    Prompts of one batch share their start and their padding; small batches of like prompts waste
    the least.
    """
    return max(1, 2 * tokens_per_batch // num_heads)


def _digest(heads: Sequence[Any]) -> str:
    """A short name for a list of heads."""
    return hashlib.sha256(repr(sorted(heads)).encode()).hexdigest()[:12]


def _tokens(batch: PromptBatch) -> int:
    return len(batch.index) * (batch.clean.shape[1] - batch.shared_prefix)
