"""Gates of all heads learned jointly while the budget shrinks from every head to none.

One gate a head, of the hard-concrete distribution (L0 regularisation, Louizos, Welling and Kingma, arXiv
1712.01312): it is exactly 0 or exactly 1 with some probability, so a model that was seen with sampled gates
is one that can be built. The loss of the samples moves the gates; beside it stands λ times the expected
cost, with λ at every step just as large as it takes to hold the budget of that step. So one run passes
through every budget, and the order in which gates close is a ranking for every ratio.

L: layers, H: query heads, G: KV groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch

LOW, HIGH = -0.1, 1.1
"""What samples are stretched to before they are cut off at 0 and 1 (Louizos et al.)."""

BEGIN, LIMIT = 3.0, 4.0
"""The logit that gates begin with, and the largest in size: at it a gate still closes in one of a hundred
samples, so that a wrong decision is heard of."""

MOMENTUM, SQUARES, EPSILON = 0.9, 0.98, 1e-8
"""Adam's averages of the gradient and of its square."""

LONGEST_STEP = 1.0
"""How far a gate's logit moves at most in a step for the sake of the budget."""

Draw = Callable[[int], torch.Tensor]
"""A number n → n samples of all gates, ``[n, L, H]``, with a graph to their logits."""


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """How gates are learned.

    Attributes:
        steps: of the optimiser, over which the budget falls from all to nothing.
        learning_rate: of the logits.
        temperature: of the distribution: the lower, the fewer samples lie between 0 and 1.
        head_cost: share of a head's own work in the cost; the rest is its KV group's cache.
        seed: of the samples.
    """

    steps: int = 600
    learning_rate: float = 0.1
    temperature: float = 1 / 3
    head_cost: float = 0.5
    seed: int = 0


# -- the distribution and its cost -----------------------------------------------------------------


def sample_gates(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """Hard-concrete samples, ``[n, L, H]`` in 0 … 1.

    Args:
        logits: ``[L, H]``.
        uniform: ``[n, L, H]`` in the open interval 0 … 1.
    """
    noise = uniform.log() - (-uniform).log1p()
    soft = torch.sigmoid((noise + logits) / temperature)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """P(g > 0) of every gate: that the head needs its keys and values at all."""
    return torch.sigmoid(logits - temperature * math.log(-LOW / HIGH))


def expected_cache(opened: torch.Tensor, group_size: int) -> torch.Tensor:
    """Expected share of KV groups in the cache: 1 − Π(1 − p_h) over a group's heads, mean over groups.

    Args:
        opened: probabilities p ``[L, H]``; gates are independent.
        group_size: query heads that share keys and values.
    """
    groups = opened.unflatten(-1, (-1, group_size))
    return (1 - (1 - groups).prod(-1)).mean()


def expected_cost(opened: torch.Tensor, group_size: int, head_cost: float) -> torch.Tensor:
    """The expected cost of all gates, 0 … 1: of the cache, and of the heads' own work (ratio r:1 counts
    heads).

    The cache alone would not pull at a head whose group another head keeps open anyway, and so at
    none as long as all are open.
    """
    return (1 - head_cost) * expected_cache(opened, group_size) + head_cost * opened.mean()


# -- the sweep -------------------------------------------------------------------------------------


class GateSweep:
    """All gates on their way from open to closed.

    Args:
        shape: (L, H).
        group_size: query heads of a KV group.
        options: see :class:`SweepOptions`.

    Attributes:
        logits: ``[L, H]`` float64.
        step: how many steps are done.
        opened: P(g > 0) summed over the steps so far, ``[L, H]``.
    """

    TENSORS = ("logits", "opened", "_momentum", "_squares")

    def __init__(self, shape: tuple[int, int], group_size: int, options: SweepOptions) -> None:
        self.group_size, self.options, self.step = group_size, options, 0
        self.logits = torch.full(shape, BEGIN, dtype=torch.float64)
        self.opened, self._momentum, self._squares = (
            torch.zeros(shape, dtype=torch.float64) for _ in range(3)
        )

    def state(self) -> dict[str, torch.Tensor]:
        """All that a later start needs."""
        return {name.strip("_"): getattr(self, name) for name in self.TENSORS} | {
            "step": torch.tensor(self.step)
        }

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Resume from a :meth:`state`."""
        for name in self.TENSORS:
            setattr(self, name, state[name.strip("_")].clone())
        self.step = int(state["step"])

    @property
    def openness(self) -> torch.Tensor:
        """Mean of P(g > 0) over the sweep, ``[L, H]``: the later a gate closes, the larger."""
        return self.opened / max(1, self.step)

    def cost(self, logits: torch.Tensor | None = None) -> torch.Tensor:
        """:func:`expected_cost` of the gates as they are, or of other logits."""
        given = self.logits if logits is None else logits
        return expected_cost(self.probability(given), self.group_size, self.options.head_cost)

    def probability(self, logits: torch.Tensor) -> torch.Tensor:
        """P(g > 0) of logits."""
        return open_probability(logits, self.options.temperature)

    @property
    def target(self) -> float:
        """The budget after the next step: a parabola, as little changes while most gates are open."""
        begin, end = (
            float(self.cost(torch.full_like(self.logits, logit))) for logit in (BEGIN, -LIMIT)
        )
        left = 1 - (self.step + 1) / self.options.steps
        return end + (begin - end) * left**2

    def run(self, losses: Callable[[int, Draw], dict[str, float]]) -> Iterator[dict[str, float]]:
        """Take the steps that are left.

        Args:
            losses: gets the step and a way to draw gates, calls ``backward`` on the loss of what it has
                drawn, and returns what is to be recorded of it.

        Yields:
            After every step its record: what ``losses`` returned, ``target`` and ``cost``, ``penalty`` (λ).
        """
        while self.step < self.options.steps:
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.step)
            logits = self.logits.clone().requires_grad_(True)

            def draw(
                count: int, logits: torch.Tensor = logits, generator: torch.Generator = generator
            ) -> torch.Tensor:
                uniform = torch.rand(count, *logits.shape, generator=generator, dtype=logits.dtype)
                uniform = uniform.clamp(1e-6, 1 - 1e-6)
                return sample_gates(logits, uniform, self.options.temperature).float()

            record = losses(self.step, draw)
            gradient = torch.zeros_like(logits) if logits.grad is None else logits.grad
            target = self.target
            penalty = self._move(gradient, target)
            self.opened += self.probability(self.logits)
            self.step += 1
            yield record | {"target": target, "cost": float(self.cost()), "penalty": penalty}

    def _move(self, gradient: torch.Tensor, target: float) -> float:
        """A step along the loss, then along the cost as far as the budget asks for; λ."""
        rate = self.options.learning_rate
        self._momentum.lerp_(gradient, 1 - MOMENTUM)
        self._squares.lerp_(gradient.square(), 1 - SQUARES)
        momentum = self._momentum / (1 - MOMENTUM ** (self.step + 1))
        squares = self._squares / (1 - SQUARES ** (self.step + 1))
        scale = squares.mean().sqrt() + EPSILON
        self.logits = (self.logits - rate * momentum / scale).clamp(-LIMIT, LIMIT)
        slope = self._slope()
        length = self._length(slope, target)
        self.logits = (self.logits - length * slope).clamp(-LIMIT, LIMIT)
        return length * float(scale) / rate

    def _slope(self) -> torch.Tensor:
        logits = self.logits.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.cost(logits), logits)
        return slope

    def _length(self, slope: torch.Tensor, target: float) -> float:
        """The least t ≥ 0 at which logits − t · slope cost no more than the target, as far as allowed."""
        if float(self.cost()) <= target:
            return 0.0
        low, high = 0.0, LONGEST_STEP / float(slope.max())
        for _ in range(30):
            middle = (low + high) / 2
            moved = (self.logits - middle * slope).clamp(-LIMIT, LIMIT)
            if float(self.cost(moved)) > target:
                low = middle
            else:
                high = middle
        return high
