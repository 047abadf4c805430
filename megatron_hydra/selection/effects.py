"""Effects of all heads on all capabilities: the chunks of work, and their normalisation."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.selection import knockout, noising, patching
from megatron_hydra.selection.cost import DecoderCost, Tokens
from megatron_hydra.selection.patching import Head
from megatron_hydra.selection.prompts import PromptBatch, PromptPair, make_batches
from megatron_hydra.selection.runner import DecoderRunner, attention_of_any_shape
from megatron_hydra.selection.time_left import Stage
from megatron_hydra.selection.work import Chunk, Compute, Result, WorkBench
from megatron_hydra.watchdog import feed_watchdog

BatchResult = Callable[[PromptBatch], Result]

LEAST_GAP = 0.1
"""A pair is not solved if its gap (clean minus corrupted readout) is below this share of its task's median:
it carries little information, and a division by a small gap would amplify noise."""

SENDERS = "senders"

SAMPLE_COST = 3e10
"""Operations of the batch for the first timing: seconds on a CPU."""

_OVER_BATCHES: dict[str, Callable[[DecoderCost, Tokens], float]] = {
    "baseline": DecoderCost.baseline,
    "receivers": DecoderCost.receivers,
    "means": DecoderCost.clean_run,
    "control": DecoderCost.clean_run,
    "direct": DecoderCost.streams,
    "attention": DecoderCost.streams,
    "attribution": DecoderCost.attribution,
    "layers": DecoderCost.whole_layers,
}
"""Kinds of work whose unit is a batch of prompts, and the cost of a unit."""


@dataclasses.dataclass(frozen=True)
class Solved:
    """The prompts of one capability that the model solves.

    Attributes:
        pairs: all pairs of the capability.
        keep: indices of the solved pairs.
        clean, corrupted: m of the two runs for the solved pairs, ``[P]`` float64.
    """

    pairs: list[PromptPair]
    keep: list[int]
    clean: np.ndarray
    corrupted: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """Decrease of m by the corruption, ``[P]``; positive."""
        return self.clean - self.corrupted


class EffectEngine:
    """Measures effects, capability by capability.

    Args:
        runner: the model.
        bench: runs the chunks of work.
        tokens_per_batch: number of positions per forward. A resumed run must use the same number, because the
            last bits of a matrix product depend on its size.
    """

    def __init__(self, runner: DecoderRunner, bench: WorkBench, tokens_per_batch: int) -> None:
        self.runner, self.bench = runner, bench
        self.tokens_per_batch = tokens_per_batch
        self._cost = DecoderCost.of(runner)
        self._baselines: dict[str, Result] = {}

    def plan(
        self,
        name: str,
        prompts: Solved,
        kinds: Sequence[str],
        total_heads: Sequence[Head] | None = None,
    ) -> None:
        """Plan the measurements of a task, for the estimate of the time left.

        Args:
            kinds: some of ``direct``, ``total``, ``attribution``, ``layers``, ``attention``.
                :meth:`plan_paths` plans ``paths`` when the receivers are known.
            total_heads: heads whose total effect is measured; default: all.
        """
        for kind in kinds:
            stage = Stage(kind, name)
            if kind == "total":
                self.bench.plan(
                    stage, self._total_chunks(name, prompts, total_heads or self._all_heads())
                )
            elif kind in _OVER_BATCHES:
                self.bench.plan(stage, self._batch_chunks(stage, self._batches(prompts)))

    def plan_paths(self, name: str, prompts: Solved, receivers: Sequence[Head]) -> None:
        """Plan the path patching of a task."""
        self.bench.plan(Stage("paths", name), self._path_chunks(name, prompts, receivers))

    def plan_senders(
        self,
        name: str,
        prompts: Solved,
        number: int,
        newest: Sequence[Head],
        older: Sequence[Head],
    ) -> None:
        """Plan a round of path patching of a task."""
        chunks = self._sender_chunks(name, prompts, newest, older)
        self.bench.plan(Stage(senders_kind(number), name), chunks)

    def expect(
        self,
        name: str,
        pairs: list[PromptPair],
        kinds: Sequence[str],
        share: float,
        receivers: int,
        total_heads: int,
    ) -> None:
        """As :meth:`plan`, before the solved prompts and the receivers are known.

        Args:
            share: expected share of solved prompts, 0 … 1.
            receivers: maximum number of receivers, assumed to be in different layers at equal distances.
            total_heads: number of heads whose total effect is measured, spread evenly over the layers.
        """
        layers, cost = self._layers, self._cost
        spread = min(receivers, layers)
        above = [[1] * round(spread * (layers - 1 - i) / layers) for i in range(layers)]
        # Typical case: receivers in the upper half, the last near the top, and their senders in the middle.
        upper = dict.fromkeys(range(layers // 2, layers), 1)
        middle = dict.fromkeys(range(layers // 4, layers // 2 + 1), 1)

        def senders(tokens: Tokens, newest: dict[int, int], older: dict[int, int]) -> float:
            heads = self.runner.num_heads
            of_layer = [cost.senders(tokens, i, heads, newest, older) for i in range(layers)]
            return cost.streams(tokens) + sum(of_layer)

        by_kind: dict[str, Callable[[Tokens], float]] = {
            "total": lambda tokens: (
                cost.prefix(tokens)
                + sum(cost.patched(tokens, i, total_heads / layers) for i in range(layers))
            ),
            "paths": lambda tokens: (
                cost.streams(tokens) + sum(cost.paths(tokens, above[i]) for i in range(layers))
            ),
            senders_kind(1): lambda tokens: senders(tokens, upper, {}),
            # The best heads, and the same number of random heads.
            "control": lambda tokens: 2 * cost.clean_run(tokens),
        }
        sizes = [Tokens.of(batch) for batch in self._batches(_all_pairs(pairs))]
        for kind in kinds:
            of_batch = by_kind.get(kind)
            if of_batch is None and kind.startswith(SENDERS):
                of_batch = functools.partial(senders, newest=middle, older=upper)
            elif of_batch is None:
                of_batch = functools.partial(_OVER_BATCHES[kind], cost)
            self.bench.time_left.plan(Stage(kind, name), share * sum(map(of_batch, sizes)))

    def time_samples(self, tasks: Iterable[list[PromptPair]], kinds: Sequence[str]) -> None:
        """Time a sample of every kind of work, plain forwards first.

        The results are discarded. Only the first process does it: the others would do the same.

        On a GPU, kernel launches dominate the time of a small batch (its pace is a hundredth of the real one),
        and every kind of work loads kernels in its first call. So on a GPU the largest batch is used, and
        every kind runs twice; only the second run is timed.

        Args:
            tasks: pairs of the tasks. On a CPU, the batch with the cost nearest to :data:`SAMPLE_COST` is used.
        """
        cost, runner, size = self._cost, self.runner, self.tokens_per_batch
        batches = [batch for pairs in tasks for batch in self._batches(_all_pairs(pairs))]

        on_cpu = runner.device_of(0).type == "cpu"

        def distance(batch: PromptBatch) -> float:
            total = math.log(cost.streams(Tokens.of(batch)) / SAMPLE_COST)
            return abs(total) if on_cpu else -total

        batch, last = min(batches, key=distance), self._layers - 1
        tokens, middle = Tokens.of(batch), self._layers // 2
        above = range(middle + 1, last + 1)
        samples: dict[str, tuple[float, Callable[[], Any]]] = {
            "baseline": (cost.baseline(tokens), lambda: patching.baseline(runner, batch)),
            "attribution": (
                cost.attribution(tokens),
                lambda: patching.attribution_effects(runner, batch),
            ),
            "receivers": (
                cost.receivers(tokens),
                lambda: noising.receiver_falls(runner, batch, size),
            ),
            "total": (
                cost.prefix(tokens)
                + sum(cost.patched(tokens, layer, 0) for layer in range(middle))
                + cost.patched(tokens, middle, runner.num_heads),
                lambda: list(
                    patching.total_effects(
                        runner, batch, [(middle, h) for h in range(runner.num_heads)], size
                    )
                ),
            ),
            "paths": (
                cost.streams(tokens) + cost.paths(tokens, [1] * (last - middle)),
                lambda: list(
                    patching.path_effects(runner, batch, [middle], [(i, 0) for i in above], size)
                ),
            ),
            SENDERS: (
                cost.streams(tokens)
                + cost.senders(tokens, middle, runner.num_heads + 1, dict.fromkeys(above, 1), {}),
                lambda: list(
                    noising.sender_falls(
                        runner,
                        batch,
                        [(middle, h) for h in range(runner.num_heads)],
                        [(i, 0) for i in above],
                        [],
                        size,
                    )
                ),
            ),
        }
        patching.baseline(runner, batch)  # the first call's one-time cost is not part of the pace
        for kind in [kind for kind in samples if kind in kinds]:
            expected, compute = samples[kind]
            feed_watchdog()
            if not on_cpu:
                compute()
            runner.wait()
            started = self.bench.clock()
            compute()
            runner.wait()
            self.bench.time_left.observe(kind, expected, self.bench.clock() - started)
        feed_watchdog()

    # -- solved prompts ----------------------------------------------------------------------------

    def check(self, name: str, pairs: list[PromptPair], rule: str, few: int) -> tuple[int, int]:
        """Run a few prompts of a task without intervention; :meth:`solve` does not run them again.

        Args:
            rule: see :meth:`solve`.
            few: minimum number of prompts (or all). Whole batches are run, so the number may be higher.

        Returns:
            Number of solved prompts, and number of prompts run.
        """
        batches = self._batches(_all_pairs(pairs))
        size = max(1, round(sum(len(b.index) for b in batches) / len(batches)))
        count = min(len(batches), -(-few // size))
        # Sorted by length and picked at equal distances, so that the longest prompts are included.
        picked = [(i + 1) * len(batches) // count - 1 for i in range(count)]
        while sum(len(batches[i].index) for i in picked) < min(few, len(pairs)):
            picked = sorted({*picked, next(i for i in range(len(batches)) if i not in picked)})
        columns = self._baseline(name, batches, picked)
        return int(_is_solved(columns, rule).sum()), len(columns["clean"])

    def solve(self, name: str, pairs: list[PromptPair], rule: str) -> Solved:
        """Drop the prompts that the model does not solve.

        Args:
            rule: ``top1``: every token of the answer is the most likely one in the clean run, and the
                corruption lowers the readout. ``pair``: the clean run prefers the answer, and the corrupted
                run prefers the wrong answer. ``off``: the corruption lowers the readout. Every rule drops
                pairs with a small gap (:data:`LEAST_GAP`).

        Returns:
            The solved prompts, possibly none.
        """
        batches = self._batches(_all_pairs(pairs))
        columns = self._baseline(name, batches, range(len(batches)))
        order = np.argsort([i for batch in batches for i in batch.index])
        clean, corrupted = (columns[key].numpy()[order] for key in ("clean", "corrupted"))
        good, gap = _is_solved(columns, rule)[order], clean - corrupted
        if good.any():
            good &= gap >= LEAST_GAP * np.median(gap[good])
        keep = np.flatnonzero(good)
        return Solved(pairs, keep.tolist(), clean[keep], corrupted[keep])

    def _baseline(self, name: str, batches: list[PromptBatch], picked: Sequence[int]) -> Result:
        """Both runs of the picked batches, each batch once; prompts in the order of the batches."""
        stage = Stage("baseline", name)
        chunks = self._batch_chunks(stage, batches)
        self.bench.plan(stage, [c for c in chunks if c.key not in self._baselines])

        def compute(b: int, members: list[Chunk]) -> Iterator[tuple[Chunk, Result]]:
            for chunk in members:
                with attention_of_any_shape(self.runner.device):
                    result = patching.baseline(self.runner, batches[b])
                yield chunk, dataclasses.asdict(result)

        wanted = [chunks[i] for i in picked]
        missing = [c for c in wanted if c.key not in self._baselines]
        if missing:
            self._baselines |= self.bench.run(stage, missing, compute)
        results = [self._baselines[c.key] for c in wanted]
        return {key: torch.cat([r[key] for r in results]) for key in results[0]}

    # -- all heads of one capability ---------------------------------------------------------------

    def receivers(self, name: str, prompts: Solved) -> np.ndarray:
        """Decrease of the readout by each head's direct path (equation 10), ``[L, H, P]``."""
        columns = self._over_batches(
            Stage("receivers", name),
            prompts,
            lambda batch: {
                "fall": noising.receiver_falls(self.runner, batch, self.tokens_per_batch)
            },
        )
        return columns["fall"].numpy()

    def senders(
        self,
        name: str,
        prompts: Solved,
        number: int,
        newest: Sequence[Head],
        older: Sequence[Head],
    ) -> np.ndarray:
        """Decrease of the readout by each head through the newest receivers (equation 11), ``[L, H, P]``.

        Args:
            number: number of the round, from 1.
            newest, older: see :func:`megatron_hydra.selection.noising.sender_falls`.
        """
        runner, batches = self.runner, self._batches(prompts)
        chunks = self._sender_chunks(name, prompts, newest, older)

        def compute(b: int, members: list[Chunk]) -> Iterator[tuple[Chunk, Result]]:
            by_layer = {c.layer: c for c in members}
            candidates = [(layer, h) for layer in by_layer for h in range(runner.num_heads)]
            for layer, _, fall in noising.sender_falls(
                runner, batches[b], candidates, newest, older, self.tokens_per_batch
            ):
                yield by_layer[layer], {"fall": fall}

        results = self._run(Stage(senders_kind(number), name), chunks, compute)
        fall = np.zeros((self._layers, runner.num_heads, len(prompts.pairs)))
        for chunk in chunks:
            columns = list(batches[chunk.batch].index)
            fall[chunk.layer][:, columns] = results[chunk.key]["fall"].numpy()
        return fall[:, :, prompts.keep]

    def mean_outputs(self, tasks: Mapping[str, Solved]) -> torch.Tensor:
        """Every head's mean output over the clean runs of some tasks, ``[L, H, d]`` float64."""
        total, count = torch.zeros(()), 0
        for name, prompts in tasks.items():
            batches = self._batches(prompts)
            stage = Stage("means", name)
            chunks = self._batch_chunks(stage, batches)

            def compute(
                b: int, members: list[Chunk], batches: list[PromptBatch] = batches
            ) -> Iterator[tuple[Chunk, Result]]:
                for chunk in members:
                    yield chunk, {"sum": knockout.output_sums(self.runner, batches[b])}

            results = self._run(stage, chunks, compute)
            total = sum((results[c.key]["sum"] for c in chunks), total)
            count += sum(knockout.num_tokens(batch) for batch in batches)
        return total / count

    def plan_control(self, name: str, prompts: Solved, times: int) -> None:
        """Plan ``times`` runs with knocked-out heads, for :meth:`knock_out`."""
        stage = Stage("control", name)
        cost = sum(chunk.cost for chunk in self._batch_chunks(stage, self._batches(prompts)))
        self.bench.time_left.plan(stage, times * cost)

    def knock_out(
        self, name: str, prompts: Solved, heads: Sequence[Head], means: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """The readout without some heads, and whether the answers are still correct, ``[P]`` each."""
        columns = self._over_batches(
            Stage("control", name),
            prompts,
            lambda batch: dataclasses.asdict(knockout.knock_out(self.runner, batch, heads, means)),
            about=f"-{_digest(heads)}",
            planned=True,
        )
        return columns["m"].numpy(), columns["right"].numpy()

    def direct(self, name: str, prompts: Solved) -> np.ndarray:
        """Normalised direct effects, ``[L, H]``."""
        return self._normalised("direct", name, prompts, patching.direct_effects)

    def attribution(self, name: str, prompts: Solved) -> np.ndarray:
        """Normalised first-order estimates of the total effects, ``[L, H]``."""
        return self._normalised("attribution", name, prompts, patching.attribution_effects)

    def layers(self, name: str, prompts: Solved) -> np.ndarray:
        """Normalised effects of whole layers' attention, ``[L]``."""
        return self._normalised("layers", name, prompts, patching.layer_effects)

    def attention_mass(self, name: str, prompts: Solved) -> np.ndarray:
        """Mean retrieval score over the prompts whose answer occurs in them, ``[L, H]``.

        Raises:
            HydraError: no prompt's answer occurs in its context.
        """
        columns = self._over_batches(
            Stage("attention", name),
            prompts,
            lambda batch: {"mass": patching.attention_mass(self.runner, batch)},
        )
        mass = columns["mass"].numpy()
        usable = ~np.isnan(mass[0, 0])
        if not usable.any():
            raise HydraError(
                f"--tasks {name}: attention_mass needs answers that occur in their prompt, and this task has "
                "none; use a retrieval task, or the strategy global_interp"
            )
        return mass[:, :, usable].mean(-1)

    def total(self, name: str, prompts: Solved, heads: Sequence[Head] | None = None) -> np.ndarray:
        """Normalised total effects, ``[L, H]``; NaN for heads that are not in ``heads``."""
        runner, batches = self.runner, self._batches(prompts)
        per_layer = self._by_layer(heads or self._all_heads())
        chunks = self._total_chunks(name, prompts, heads or self._all_heads())

        def compute(b: int, members: list[Chunk]) -> Iterator[tuple[Chunk, Result]]:
            by_layer = {c.layer: c for c in members}
            todo = [(layer, h) for layer in by_layer for h in per_layer[layer]]
            for layer, _, m in patching.total_effects(
                runner, batches[b], todo, self.tokens_per_batch
            ):
                yield by_layer[layer], {"m": m}

        results = self._run(Stage("total", name), chunks, compute)
        m = np.full((self._layers, runner.num_heads, len(prompts.pairs)), np.nan)
        for chunk in chunks:
            heads_here = sorted(per_layer[chunk.layer])
            columns = list(batches[chunk.batch].index)
            m[np.ix_([chunk.layer], heads_here, columns)] = results[chunk.key]["m"].numpy()
        return normalise(m[:, :, prompts.keep], prompts)

    def paths(self, name: str, prompts: Solved, receivers: Sequence[Head]) -> dict[str, np.ndarray]:
        """Normalised effects of every sender through the receivers' inputs: path -> ``[L, H]``."""
        runner, batches = self.runner, self._batches(prompts)
        chunks = self._path_chunks(name, prompts, receivers)

        def compute(b: int, members: list[Chunk]) -> Iterator[tuple[Chunk, Result]]:
            by_layer = {c.layer: c for c in members}
            for layer, m in patching.path_effects(
                runner, batches[b], list(by_layer), receivers, self.tokens_per_batch
            ):
                yield by_layer[layer], {"m": m}

        results = self._run(Stage("paths", name), chunks, compute)
        # A head above all receivers has no path to them: its m is the corrupted run's.
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

    # -- chunks ------------------------------------------------------------------------------------

    def _batch_chunks(
        self, stage: Stage, batches: list[PromptBatch], about: str = ""
    ) -> list[Chunk]:
        cost = _OVER_BATCHES[stage.kind]
        return [
            Chunk(f"{stage}-b{b}{about}", cost=cost(self._cost, Tokens.of(batch)), batch=b)
            for b, batch in enumerate(batches)
        ]

    def _total_chunks(self, name: str, prompts: Solved, heads: Sequence[Head]) -> list[Chunk]:
        return [
            Chunk(
                f"total-{name}-b{b}-l{layer}-{_digest(heads_here)}",
                cost=self._cost.patched(Tokens.of(batch), layer, len(heads_here)),
                setup=self._cost.prefix(Tokens.of(batch)),
                batch=b,
                layer=layer,
            )
            for b, batch in enumerate(self._batches(prompts))
            for layer, heads_here in self._by_layer(heads).items()
        ]

    def _sender_chunks(
        self, name: str, prompts: Solved, newest: Sequence[Head], older: Sequence[Head]
    ) -> list[Chunk]:
        top = max((layer for layer, _ in newest), default=0)
        counts = [collections.Counter(layer for layer, _ in heads) for heads in (newest, older)]
        return [
            Chunk(
                f"senders-{name}-b{b}-l{layer}-{_digest(newest)}-{_digest(older)}",
                cost=self._cost.senders(Tokens.of(batch), layer, self.runner.num_heads, *counts),
                # The streams, and the unpatched run for all comparisons.
                setup=self._cost.streams(Tokens.of(batch))
                + self._cost.senders(Tokens.of(batch), 0, 1, *counts),
                batch=b,
                layer=layer,
            )
            for b, batch in enumerate(self._batches(prompts))
            for layer in range(top)
        ]

    def _path_chunks(self, name: str, prompts: Solved, receivers: Sequence[Head]) -> list[Chunk]:
        top = max((layer for layer, _ in receivers), default=0)
        in_layer = collections.Counter(layer for layer, _ in receivers)
        return [
            Chunk(
                f"path-{name}-b{b}-l{layer}-{_digest(receivers)}",
                cost=self._cost.paths(
                    Tokens.of(batch), [n for at, n in in_layer.items() if at > layer]
                ),
                setup=self._cost.streams(Tokens.of(batch)),
                batch=b,
                layer=layer,
            )
            for b, batch in enumerate(self._batches(prompts))
            for layer in range(top)
        ]

    # -- helpers -----------------------------------------------------------------------------------

    @property
    def _layers(self) -> int:
        return self.runner.num_layers

    def _all_heads(self) -> list[Head]:
        return [(i, h) for i in range(self._layers) for h in range(self.runner.num_heads)]

    def _by_layer(self, heads: Sequence[Head]) -> dict[int, list[int]]:
        """Layer -> its heads among these, layers ascending."""
        return {i: [h for at, h in heads if at == i] for i in sorted({at for at, _ in heads})}

    def _batches(self, prompts: Solved) -> list[PromptBatch]:
        size = prompt_tokens(self.tokens_per_batch, self.runner.num_heads)
        return make_batches(prompts.pairs, size, prompts.keep)

    def _run(self, stage: Stage, chunks: list[Chunk], compute: Compute) -> dict[str, Result]:
        self.bench.plan(stage, chunks)
        return self.bench.run(stage, chunks, compute)

    def _normalised(
        self,
        kind: str,
        name: str,
        prompts: Solved,
        effect: Callable[[DecoderRunner, PromptBatch], torch.Tensor],
    ) -> np.ndarray:
        columns = self._over_batches(
            Stage(kind, name), prompts, lambda batch: {"m": effect(self.runner, batch)}
        )
        return normalise(columns["m"].numpy(), prompts)

    def _over_batches(
        self,
        stage: Stage,
        prompts: Solved,
        measure: BatchResult,
        about: str = "",
        planned: bool = False,
    ) -> Result:
        """Run ``measure`` on every batch; return prompts (the last axis) in the order of ``keep``.

        Args:
            about: distinguishes these results from others of the stage.
            planned: whether the stage was planned before, with more work than this.
        """
        batches = self._batches(prompts)
        chunks = self._batch_chunks(stage, batches, about)

        def compute(b: int, members: list[Chunk]) -> Iterator[tuple[Chunk, Result]]:
            for chunk in members:
                yield chunk, measure(batches[b])

        results = (self.bench.run if planned else self._run)(stage, chunks, compute)
        order = np.argsort([i for batch in batches for i in batch.index])
        names = results[chunks[0].key]
        return {
            key: torch.cat([results[c.key][key] for c in chunks], dim=-1)[..., order]
            for key in names
        }


def _all_pairs(pairs: list[PromptPair]) -> Solved:
    """All pairs, before the solved ones are known."""
    nothing = np.zeros(0)
    return Solved(pairs, list(range(len(pairs))), nothing, nothing)


def _is_solved(columns: Result, rule: str) -> np.ndarray:
    """Mask of the solved prompts of a baseline (see :meth:`EffectEngine.solve`), ``[P]`` bool."""
    clean, corrupted = columns["clean"].numpy(), columns["corrupted"].numpy()
    good = clean > corrupted
    if rule == "top1":
        good &= columns["solved"].numpy()
    elif rule == "pair":
        good &= (clean > 0) & (corrupted < 0)
    return np.asarray(good)


def normalise(m: np.ndarray, prompts: Solved) -> np.ndarray:
    """Turn readouts into effects: 0 for the corrupted run, 1 for the clean run.

    Numerator and denominator are averaged over prompts first, so that prompts with a small difference between
    clean and corrupted run do not dominate.

    Args:
        m: readout after the intervention, ``[..., P]``.
    """
    gap = prompts.clean.mean() - prompts.corrupted.mean()
    return (m.mean(-1) - prompts.corrupted.mean()) / gap


def senders_kind(number: int) -> str:
    """The kind of work of a round of path patching; all rounds share one pace."""
    return SENDERS if number == 1 else f"{SENDERS}_{number}"


def top_heads(scores: np.ndarray, count: int, share: float) -> list[Head]:
    """The ``count`` best heads whose score is at least ``share`` of the best; at least one."""
    order = np.argsort(-scores.reshape(-1), kind="stable")[: max(1, count)]
    best = scores.reshape(-1)[order[0]]
    heads = scores.shape[1]
    chosen = [i for i in order if scores.reshape(-1)[i] >= share * best] or [order[0]]
    return sorted((int(i) // heads, int(i) % heads) for i in chosen)


def prompt_tokens(tokens_per_batch: int, num_heads: int) -> int:
    """Number of clean and corrupted tokens in a batch, small enough that all heads of a layer run together.

    Prompts of one batch share their prefix and their padding. Small batches of similar prompts waste least.
    """
    return max(1, 2 * tokens_per_batch // num_heads)


def _digest(heads: Sequence[Any]) -> str:
    """A short name for a list of heads."""
    return hashlib.sha256(repr(sorted(heads)).encode()).hexdigest()[:12]
