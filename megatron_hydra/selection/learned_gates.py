"""Joint selection: find the heads that a student needs *together*, and measure every budget.

Effects of single heads miss redundancy: each of two backup heads looks useless, or both look needed. Scores
also do not show how many heads are needed. Here every head computes full attention and GDN
(:mod:`~megatron_hydra.selection.gated_decoder`). The GDN branch first learns stage 1 on text. Then all weights
are frozen, and one gate per head is learned while the budget decreases to zero
(:mod:`~megatron_hydra.selection.gate_sweep`). The loss is

    KL(teacher ‖ gated model) on the answers of prompts  +  the same on all tokens of text.

Heads are ranked by the time that their gate stays open. The most similar method is FlashMorph
(arXiv 2606.30562), which learns gates of whole layers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import HeadMap, num_full_attention_heads
from megatron_hydra.selection.effects import EffectEngine, Solved
from megatron_hydra.selection.gate_sweep import Draw, GateSweep, SweepOptions, expected_cache
from megatron_hydra.selection.gated_decoder import GatedDecoder
from megatron_hydra.selection.prompts import PromptBatch, PromptPair, make_batches
from megatron_hydra.selection.ranking import rank_heads
from megatron_hydra.selection.time_left import Stage
from megatron_hydra.stopping import Stopped, stop_requested

TEXT_SHARE = 0.25
"""Share of plain text in a step's tokens; the rest are prompts."""

HELD_OUT = 4
"""One of this many solved prompts of a task is held out for the curve …"""
MOST_HELD_OUT = 24
"""… but at most this many of a capability."""

TEXT_ASKED = 8192
"""Number of text tokens for the curve's divergence."""

CURVE_RATIOS = ("dense", "1:1", "2:1", "3:1", "5:1", "7:1", "11:1", "15:1", "31:1", "all-gdn")

RANDOM_ORDERS = 3

LEARNING_RATES = (1e-3, 1e-5)
"""First and last learning rate of the alignment, cosine (as in stage 1 of the transfer)."""
WARMUP_STEPS = 50
LARGEST_GRADIENT = 1.0

SAVE_SECONDS = 300.0

RECORDS = 100
"""Number of points of the sweep in a map."""

Head = tuple[int, int]
Orders = Mapping[str, Sequence[Head]]


@dataclasses.dataclass(frozen=True)
class GateOptions:
    """Amount of training.

    Attributes:
        align_tokens: number of text tokens for the GDN branch.
        gate_tokens: number of prompt and text tokens for the gates.
        steps: number of optimizer steps of the gates.
        head_cost: see :class:`~megatron_hydra.selection.gate_sweep.SweepOptions`.
        seed: seed of initial decays, samples and batches.
    """

    align_tokens: int
    gate_tokens: int
    steps: int
    head_cost: float
    seed: int

    @property
    def step_tokens(self) -> int:
        """Number of tokens per step, for the gates and for the alignment."""
        return max(1, self.gate_tokens // self.steps)

    @property
    def align_steps(self) -> int:
        """Number of steps of the alignment."""
        return max(1, self.align_tokens // self.step_tokens)


@dataclasses.dataclass(frozen=True)
class Found:
    """Result of the learning.

    Attributes:
        openness: mean of P(g > 0) over the sweep, ``[L, H]``.
        details: for the head map: ``sweep``, ``curve``, ``alignment``.
    """

    openness: np.ndarray
    details: dict[str, Any]


def learn(
    engine: EffectEngine,
    capabilities: Mapping[str, Sequence[str]],
    prompts: Mapping[str, Solved],
    text: Sequence[torch.Tensor],
    options: GateOptions,
    weights: Mapping[str, float],
    compared: Orders,
) -> Found:
    """Align the GDN branch, learn the gates, and measure the curve.

    Args:
        engine: the teacher and the bench. States are saved there, and a later start resumes from them.
        capabilities: capability → its tasks.
        prompts: task → its prompts; unsolved ones are not used.
        text: token sequences, int64 ``[1, S]``.
        options: see :class:`GateOptions`.
        weights: capability → relative frequency of its prompts; default 1.
        compared: name → another ranking, whose curve is measured as well.
    """
    materials = _TrainingData.of(capabilities, prompts, text, weights)
    learner = _Learner(engine, materials, options)
    alignment = learner.align()
    sweep, records = learner.sweep()
    openness = sweep.openness.numpy()
    ranking = rank_heads(openness)
    generator = np.random.default_rng([options.seed, 5])
    orders = {"learned_gates": ranking, **compared}
    drawn = [
        [ranking[i] for i in generator.permutation(len(ranking))] for _ in range(RANDOM_ORDERS)
    ]
    details = {
        "alignment": alignment,
        "sweep": records,
        "openness": openness.tolist(),
        "held_out": {name: len(pairs) for name, pairs in materials.asked.items()},
        "curve": learner.curve(orders, drawn),
    }
    return Found(openness, {"gates": details})


# -- prompts and text ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _TrainingData:
    """Training data of the gates, and held-out prompts and text.

    Attributes:
        learned: capability → task → pairs.
        asked: capability → held-out pairs.
        text: ``[S]`` each.
        weights: capability → its weight.
    """

    learned: dict[str, dict[str, list[PromptPair]]]
    asked: dict[str, list[PromptPair]]
    text: list[torch.Tensor]
    weights: dict[str, float]

    @classmethod
    def of(
        cls,
        capabilities: Mapping[str, Sequence[str]],
        prompts: Mapping[str, Solved],
        text: Sequence[torch.Tensor],
        weights: Mapping[str, float],
    ) -> _TrainingData:
        learned: dict[str, dict[str, list[PromptPair]]] = {}
        asked: dict[str, list[PromptPair]] = {}
        for name, tasks in capabilities.items():
            learned[name], asked[name] = {}, []
            most = -(-MOST_HELD_OUT // len(tasks))
            for task in tasks:
                solved = [prompts[task].pairs[i] for i in prompts[task].keep]
                if len(solved) < 2:
                    raise HydraError(
                        f"--tasks {task}: learned_gates needs at least two solved prompts, one to learn from "
                        f"and one to measure on; the model solves {len(solved)}: raise --num-prompts"
                    )
                out = (list(range(HELD_OUT - 1, len(solved), HELD_OUT)) or [len(solved) - 1])[:most]
                asked[name] += [solved[i] for i in out]
                learned[name][task] = [p for i, p in enumerate(solved) if i not in set(out)]
        return cls(
            learned,
            asked,
            [piece.flatten() for piece in text if piece.numel() > 1],
            {name: float(weights.get(name, 1.0)) for name in capabilities},
        )

    def draw_prompts(self, generator: np.random.Generator, tokens: int) -> list[PromptPair]:
        """Draw prompts of about ``tokens`` tokens, at least one: capability by weight, then task, then pair."""
        names = list(self.learned)
        share = np.array([self.weights[name] for name in names])
        drawn: list[PromptPair] = []
        while not drawn or sum(p.num_tokens for p in drawn) + drawn[-1].num_tokens <= tokens:
            tasks = self.learned[names[generator.choice(len(names), p=share / share.sum())]]
            pairs = tasks[list(tasks)[generator.integers(len(tasks))]]
            drawn.append(pairs[generator.integers(len(pairs))])
        return drawn

    def draw_text(self, generator: np.random.Generator, tokens: int) -> list[torch.Tensor]:
        """Draw pieces of text of about ``tokens`` tokens, at least one."""
        drawn: list[torch.Tensor] = []
        while not drawn or sum(map(len, drawn)) + len(drawn[-1]) <= tokens:
            drawn.append(self.text[generator.integers(len(self.text))])
        return drawn

    def fingerprint(self) -> str:
        """Hash of all token ids and weights."""
        pairs = {
            name: {task: [dataclasses.astuple(p) for p in pairs] for task, pairs in tasks.items()}
            for name, tasks in self.learned.items()
        }
        body = [pairs, [piece.tolist() for piece in self.text], self.weights]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def _text_batches(
    pieces: Sequence[torch.Tensor], tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of pieces padded on the right, ``[B, T]`` up to a maximum size, and masks of real tokens."""
    groups: list[list[torch.Tensor]] = []
    for piece in sorted(pieces, key=len):
        if groups and len(piece) * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    for group in groups:
        real = torch.zeros(len(group), len(group[-1]), dtype=torch.bool)
        ids = torch.zeros(real.shape, dtype=torch.int64)
        for row, piece in enumerate(group):
            ids[row, : len(piece)], real[row, : len(piece)] = piece, True
        yield ids, real


# -- learning --------------------------------------------------------------------------------------


class _Learner:
    """Learns first the branches, then the gates, and measures the curve."""

    def __init__(
        self, engine: EffectEngine, materials: _TrainingData, options: GateOptions
    ) -> None:
        self.bench, self.runner = engine.bench, engine.runner
        self.tokens_per_batch = engine.tokens_per_batch
        self.materials, self.options = materials, options
        self.recompute = self.runner.device.type != "cpu"
        self.decoder = GatedDecoder(
            self.runner, [piece[None] for piece in self._first_text()], options.seed
        )
        shown = f"{materials.fingerprint()} {options}"
        self._key = hashlib.sha256(shown.encode()).hexdigest()[:16]
        weights = sum(p.numel() for layer in self.runner.layers for p in layer.parameters())
        self._token_cost = 2.0 * weights
        self._step_cost = self._token_cost * options.step_tokens
        self._align_stage, self._sweep_stage = Stage("align", "text"), Stage("gates", "")
        self.bench.time_left.plan(self._align_stage, 4 * self._step_cost * options.align_steps)
        self.bench.time_left.plan(self._sweep_stage, 8 * self._step_cost * options.steps)
        self.bench.say(
            f"learned gates: {options.align_steps} steps of alignment, {options.steps} steps of gates, "
            f"{options.step_tokens} tokens each"
        )

    def _first_text(self) -> list[torch.Tensor]:
        """The first pieces of text, for γ and for the curve."""
        lengths = np.cumsum([len(piece) for piece in self.materials.text])
        return self.materials.text[: int(np.searchsorted(lengths, TEXT_ASKED)) + 1]

    def _should_stop(self) -> bool:
        """Whether to stop: only if a later start can resume from the saved state."""
        return stop_requested() and self.bench.folder is not None

    # -- stage 1 -----------------------------------------------------------------------------------

    def align(self) -> dict[str, Any]:
        """Train the GDN branches. Return the losses of the last steps, layer by layer."""
        task = _Alignment(self.decoder, self.options, self._align_batch)
        key = f"alignment {self._key}"
        kept = self.bench.kept(key)
        if kept is not None:
            task.load(kept)
        left = self.options.align_steps - task.step
        self.bench.time_left.plan(self._align_stage, 4 * self._step_cost * left)
        saved = time.monotonic()
        for _ in self.bench.follow(self._align_stage, task.run(), 4 * self._step_cost):
            stopping = self._should_stop()
            if stopping or time.monotonic() - saved > SAVE_SECONDS:
                self.bench.keep(key, task.state())
                saved = time.monotonic()
            if stopping:
                raise Stopped
        self.bench.keep(key, task.state())
        tokens = self.options.align_steps * self.options.step_tokens
        return {
            "tokens": tokens,
            "times_over_text": tokens / sum(map(len, self.materials.text)),
            "loss_by_layer": task.recent.tolist(),
        }

    def _align_batch(
        self, step: int
    ) -> Iterator[tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Micro-batches of a step: share of its tokens, ids, mask of real tokens, the teacher's heads."""
        generator = np.random.default_rng([self.options.seed, 1, step])
        pieces = self.materials.draw_text(generator, self.options.step_tokens)
        total = sum(map(len, pieces))
        for ids, real in _text_batches(pieces, self.tokens_per_batch):
            # Any number of heads, from none to all: a branch must work with any other heads.
            share = generator.random((len(ids), 1, 1))
            heads = (len(ids), self.runner.num_layers, self.runner.num_heads)
            keep = torch.from_numpy(generator.random(heads) < share).float()
            yield int(real.sum()) / total, ids, real, keep

    # -- the gates ---------------------------------------------------------------------------------

    def sweep(self) -> tuple[GateSweep, dict[str, list[Any]]]:
        """Learn the gates. Return the sweep and a selection of its records."""
        options = SweepOptions(
            steps=self.options.steps, head_cost=self.options.head_cost, seed=self.options.seed
        )
        shape = (self.runner.num_layers, self.runner.num_heads)
        sweep = GateSweep(shape, self.runner.group_size, options)
        key, rows = f"gates {self._key}", []
        kept = self.bench.kept(key)
        if kept is not None:
            rows = kept.pop("records").tolist()
            sweep.load(kept)
        cost = 8 * self._step_cost
        self.bench.time_left.plan(self._sweep_stage, cost * (options.steps - sweep.step))
        saved = time.monotonic()

        def save() -> None:
            records = torch.tensor(rows, dtype=torch.float64)
            self.bench.keep(key, sweep.state() | {"records": records})

        for record in self.bench.follow(self._sweep_stage, sweep.run(self._losses), cost):
            rows.append([record[name] for name in _RECORDED])
            stopping = self._should_stop()
            if stopping or time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
            if stopping:
                raise Stopped
        save()
        return sweep, _interval_means(rows)

    def _losses(self, step: int, draw: Draw) -> dict[str, float]:
        """Loss and gradient of one step; every sequence has its own gates."""
        generator = np.random.default_rng([self.options.seed, 2, step])
        tokens = self.options.step_tokens
        pairs = self.materials.draw_prompts(generator, round(tokens * (1 - TEXT_SHARE)))
        pieces = self.materials.draw_text(generator, round(tokens * TEXT_SHARE))
        sums = {"prompts": 0.0, "text": 0.0}
        for batch in make_batches(pairs, 2 * self.tokens_per_batch):
            teacher = self._at_answers(batch, None)
            student = self._at_answers(batch, draw(len(batch.index)))
            loss = self._answer_divergence(batch, student, teacher).sum() / len(pairs)
            loss.backward()
            sums["prompts"] += float(loss.detach())
        total = sum(map(len, pieces))
        for ids, real in _text_batches(pieces, self.tokens_per_batch):
            teacher = self._at_text(ids, real, None)
            student = self._at_text(ids, real, draw(len(ids)))
            loss = self.decoder.divergence(student, teacher).sum() / total
            loss.backward()
            sums["text"] += float(loss.detach())
        return sums

    def _at_answers(self, batch: PromptBatch, gates: torch.Tensor | None) -> torch.Tensor:
        """Last streams at the answers, ``[P, A, D]``; without gates the teacher's."""
        if gates is not None:
            return batch.at_answers(self.decoder.forward(batch.clean, gates, self.recompute))
        with torch.no_grad():
            return batch.at_answers(self.decoder.forward(batch.clean, None))

    def _at_text(
        self, ids: torch.Tensor, real: torch.Tensor, gates: torch.Tensor | None
    ) -> torch.Tensor:
        """Last streams of all real tokens, ``[N, D]``; without gates the teacher's."""
        real = real.to(self.runner.last_device)
        if gates is not None:
            return self.decoder.forward(ids, gates, self.recompute)[real]
        with torch.no_grad():
            return self.decoder.forward(ids, None)[real]

    def _answer_divergence(
        self, batch: PromptBatch, student: torch.Tensor, teacher: torch.Tensor
    ) -> torch.Tensor:
        """KL at the answer, mean over its tokens, ``[P]``, from streams ``[P, A, D]``."""
        counts = (batch.weights > 0).float()
        share = (counts / counts.sum(-1, keepdim=True)).to(self.runner.last_device)
        rows = self.decoder.divergence(student.flatten(0, 1), teacher.flatten(0, 1))
        return (rows.view(share.shape) * share).sum(-1)

    # -- the curve ---------------------------------------------------------------------------------

    @torch.no_grad()
    def curve(self, orders: Orders, drawn: Sequence[Sequence[Head]]) -> list[dict[str, Any]]:
        """Results of the aligned student if the first n heads of a ranking are FA, for decreasing n.

        Args:
            orders: name → ranking.
            drawn: random rankings.

        Returns:
            For each n: ``heads``; under ``by`` the result of :meth:`_measure_held_out` for each ranking; under
            ``random`` the same for each random ranking.
        """
        layers, heads = self.runner.num_layers, self.runner.num_heads
        counts = {num_full_attention_heads(layers, heads, ratio) for ratio in CURVE_RATIOS}
        every = [*orders.values(), *drawn]
        sets = list(dict.fromkeys(frozenset(o[:n]) for n in sorted(counts) for o in every))
        questions = self._held_out_data()
        stage, cost = Stage("curve", ""), self._token_cost * questions.tokens
        self.bench.time_left.plan(stage, cost * len(sets))
        answers: dict[frozenset[Head], dict[str, Any]] = {}
        asked = ((chosen, self._measure_held_out(chosen, questions)) for chosen in sets)
        for chosen, answer in self.bench.follow(stage, asked, cost):
            answers[chosen] = answer
            if self._should_stop():
                raise Stopped
        return [
            {
                "heads": count,
                "by": {name: answers[frozenset(order[:count])] for name, order in orders.items()},
                "random": [answers[frozenset(order[:count])] for order in drawn],
            }
            for count in sorted(counts, reverse=True)
        ]

    def _measure_held_out(self, chosen: frozenset[Head], questions: _HeldOutData) -> dict[str, Any]:
        """Measure held-out data with ``chosen`` FA heads: accuracy and KL by capability, KL of text, cache."""
        gates = torch.zeros(1, self.runner.num_layers, self.runner.num_heads)
        for layer, head in chosen:
            gates[0, layer, head] = 1.0
        result: dict[str, Any] = {
            "cache": float(expected_cache(gates[0], self.runner.group_size)),
            "accuracy": {},
            "divergence": {},
        }
        for name, asked in questions.prompts.items():
            right = divergence = 0.0
            for batch, teacher in asked:
                student = self._at_answers(batch, gates)
                top = self.runner.logits(student).argmax(-1).cpu()
                right += float(batch.answered(top).sum())
                divergence += float(self._answer_divergence(batch, student, teacher).sum())
            count = sum(len(batch.index) for batch, _ in asked)
            result["accuracy"][name] = right / count
            result["divergence"][name] = divergence / count
        total = 0.0
        for ids, real, teacher in questions.text:
            total += float(self.decoder.divergence(self._at_text(ids, real, gates), teacher).sum())
        tokens = sum(int(real.sum()) for _, real, _ in questions.text)
        return result | {"text_divergence": total / tokens}

    def _held_out_data(self) -> _HeldOutData:
        prompts = {
            name: [
                (batch, self._at_answers(batch, None))
                for batch in make_batches(pairs, 2 * self.tokens_per_batch)
            ]
            for name, pairs in self.materials.asked.items()
        }
        text = [
            (ids, real, self._at_text(ids, real, None))
            for ids, real in _text_batches(self._first_text(), self.tokens_per_batch)
        ]
        return _HeldOutData(prompts, text)


@dataclasses.dataclass(frozen=True)
class _HeldOutData:
    """Held-out data of the curve, with the teacher's last streams.

    Attributes:
        prompts: capability → held-out batches, each with streams ``[P, A, D]``.
        text: ids and mask of real tokens ``[B, T]``, with streams ``[N, D]``.
    """

    prompts: dict[str, list[tuple[PromptBatch, torch.Tensor]]]
    text: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    @property
    def tokens(self) -> int:
        """Number of tokens of all held-out data."""
        asked = sum(batch.clean.numel() for pairs in self.prompts.values() for batch, _ in pairs)
        return asked + sum(ids.numel() for ids, _, _ in self.text)


_RECORDED = ("prompts", "text", "target", "cost", "penalty")


def _interval_means(rows: list[list[float]]) -> dict[str, list[Any]]:
    """Means over equal intervals of steps, at most :data:`RECORDS`, and the last step of each interval."""
    cuts = np.unique(np.linspace(0, len(rows), min(RECORDS, len(rows)) + 1).round().astype(int))
    means = [np.mean(rows[a:b], axis=0) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    columns = {name: [float(row[i]) for row in means] for i, name in enumerate(_RECORDED)}
    return {"step": [int(b) for b in cuts[1:]]} | columns


class _Alignment:
    """Stage 1 of the GDN branches: AdamW on fp32 copies, cosine schedule from 1e-3 to 1e-5."""

    def __init__(self, decoder: GatedDecoder, options: GateOptions, batches: Any) -> None:
        self.decoder, self.options, self.batches = decoder, options, batches
        self.step = 0
        self.parameters = [list(branch.parameters()) for branch in decoder.branches]
        self.masters = [
            [p.detach().float().clone() for p in of_layer] for of_layer in self.parameters
        ]
        flat = [p for of_layer in self.masters for p in of_layer]
        self.optimizer = torch.optim.AdamW(
            flat, lr=LEARNING_RATES[0], betas=(0.9, 0.95), weight_decay=0.0
        )
        self.recent = torch.zeros(len(self.masters), dtype=torch.float64)

    def run(self) -> Iterator[None]:
        """Do the remaining steps; between steps the branches are frozen."""
        while self.step < self.options.align_steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate()
            losses = self._gradients()
            for parameters, masters in zip(self.parameters, self.masters, strict=True):
                for parameter, master in zip(parameters, masters, strict=True):
                    master.grad = None if parameter.grad is None else parameter.grad.float()
                    parameter.grad = None
                # Layer by layer, because layers are independent.
                torch.nn.utils.clip_grad_norm_(masters, LARGEST_GRADIENT)
            self.optimizer.step()
            self._copy_back()
            # Approximately the mean of the last ten steps.
            self.recent += (losses - self.recent) / min(self.step + 1, 10)
            self.step += 1
            yield

    def _gradients(self) -> torch.Tensor:
        losses = torch.zeros_like(self.recent)
        for branch in self.decoder.branches:
            branch.requires_grad_(True)
        try:
            for share, ids, real, keep in self.batches(self.step):
                of_layers = []
                for loss in self.decoder.alignment_losses(ids, real, keep):
                    (share * loss).backward()
                    of_layers.append(loss.detach())
                # Read after the last layer: at each one the host would wait for the GPU.
                losses += share * torch.tensor([float(loss) for loss in of_layers])
        finally:
            for branch in self.decoder.branches:
                branch.requires_grad_(False)
        return losses

    def _rate(self) -> float:
        high, low = LEARNING_RATES
        steps = self.options.align_steps
        warm = min(WARMUP_STEPS, -(-steps // 10))
        if self.step < warm:
            return high * (self.step + 1) / warm
        done = (self.step - warm) / max(1, steps - warm)
        return low + (high - low) * (1 + math.cos(math.pi * done)) / 2

    @torch.no_grad()
    def _copy_back(self) -> None:
        for parameters, masters in zip(self.parameters, self.masters, strict=True):
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)

    def state(self) -> dict[str, torch.Tensor]:
        """State for resuming."""
        state = {"step": torch.tensor(self.step), "recent": self.recent.clone()}
        for number, master in enumerate(p for of_layer in self.masters for p in of_layer):
            state[f"{number}.weight"] = master
            for name, value in self.optimizer.state.get(master, {}).items():
                state[f"{number}.{name}"] = torch.as_tensor(value)
        return {name: tensor.cpu() for name, tensor in state.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Resume from a :meth:`state`."""
        self.step, self.recent = int(state["step"]), state["recent"].clone()
        for number, master in enumerate(p for of_layer in self.masters for p in of_layer):
            master.copy_(state[f"{number}.weight"])
            moments = {
                name: state[f"{number}.{name}"].to(master.device if name != "step" else "cpu")
                for name in ("step", "exp_avg", "exp_avg_sq")
                if f"{number}.{name}" in state
            }
            if moments:
                self.optimizer.state[master] = moments
        self._copy_back()


def orders_of(maps: Sequence[tuple[str, HeadMap]]) -> dict[str, list[Head]]:
    """Rankings of other maps, by file and strategy.

    Args:
        maps: (file, map).

    Raises:
        HydraError: a map has no ranking.
    """
    orders: dict[str, list[Head]] = {}
    for source, head_map in maps:
        if not head_map.ranking:
            raise HydraError(
                f"--compare {source}: strategy {head_map.strategy} gives no ranking to compare with"
            )
        name = head_map.strategy
        if name in orders or name == "learned_gates":
            name = f"{name} ({source})"
        orders[name] = list(head_map.ranking)
    return orders
