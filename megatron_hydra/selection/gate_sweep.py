"""Learn the gates of all heads jointly while the budget decreases from all heads to none.

Each head has one gate with the hard-concrete distribution (L0 regularisation, Louizos, Welling and Kingma,
arXiv 1712.01312). With some probability a gate is exactly 0 or exactly 1, so a model with sampled gates is a
model that can be built. The loss of the samples changes the gates. λ times the expected cost is added to the
loss. At every step, λ is the smallest value that keeps the step's budget. So one run covers every budget, and
the order in which gates close is a ranking for every ratio.

L: layers, H: query heads, G: KV groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch

LOW, HIGH = -0.1, 1.1
"""The interval to which samples are stretched before they are clipped to 0 … 1 (Louizos et al.)."""

BEGIN, LIMIT = 3.0, 4.0
"""The initial logit of gates, and the largest absolute value. With it a gate still closes in one of a hundred
samples, so the loss can show a wrong decision."""

MOMENTUM, SQUARES, EPSILON = 0.9, 0.98, 1e-8
"""Adam's coefficients for the averages of the gradient and of its square."""

LONGEST_STEP = 1.0
"""Maximum change of a gate's logit per step to keep the budget."""

Draw = Callable[[int], torch.Tensor]
"""A number n → n samples of all gates, ``[n, L, H]``, differentiable in the logits."""


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """Options for learning the gates.

    Attributes:
        steps: number of optimizer steps, in which the budget decreases from all heads to none.
        learning_rate: learning rate of the logits.
        temperature: temperature of the distribution; lower values give fewer samples between 0 and 1.
        head_cost: share of a head's own work in the cost; the rest is its KV group's cache.
        seed: seed of the samples.
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
        uniform: uniform random numbers ``[n, L, H]`` in the open interval (0, 1).
    """
    noise = uniform.log() - (-uniform).log1p()
    soft = torch.sigmoid((noise + logits) / temperature)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """P(g > 0) of every gate: the probability that the head needs its keys and values."""
    return torch.sigmoid(logits - temperature * math.log(-LOW / HIGH))


def expected_cache(opened: torch.Tensor, group_size: int) -> torch.Tensor:
    """Expected share of KV groups in the cache: 1 − Π(1 − p_h) over a group's heads, mean over groups.

    Args:
        opened: probabilities p ``[L, H]``; gates are independent.
        group_size: number of query heads that share keys and values.
    """
    groups = opened.unflatten(-1, (-1, group_size))
    return (1 - (1 - groups).prod(-1)).mean()


def expected_cost(opened: torch.Tensor, group_size: int, head_cost: float) -> torch.Tensor:
    """Expected cost of all gates, 0 … 1: cost of the cache and of the heads' own work (r:1 counts heads).

    The cost of the cache alone has no gradient for a head if another head keeps its group open. So it would
    have no gradient for any head while all are open.
    """
    return (1 - head_cost) * expected_cache(opened, group_size) + head_cost * opened.mean()


# -- the sweep -------------------------------------------------------------------------------------


class GateSweep:
    """The sweep of all gates from open to closed.

    Args:
        shape: (L, H).
        group_size: number of query heads of a KV group.
        options: see :class:`SweepOptions`.

    Attributes:
        logits: ``[L, H]`` float64.
        step: number of steps done.
        opened: sum of P(g > 0) over the steps so far, ``[L, H]``.
    """

    TENSORS = ("logits", "opened", "_momentum", "_squares")

    def __init__(self, shape: tuple[int, int], group_size: int, options: SweepOptions) -> None:
        self.group_size, self.options, self.step = group_size, options, 0
        self.logits = torch.full(shape, BEGIN, dtype=torch.float64)
        self.opened, self._momentum, self._squares = (
            torch.zeros(shape, dtype=torch.float64) for _ in range(3)
        )

    def state(self) -> dict[str, torch.Tensor]:
        """State for resuming."""
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
        """Mean of P(g > 0) over the sweep, ``[L, H]``; larger for gates that close later."""
        return self.opened / max(1, self.step)

    def cost(self, logits: torch.Tensor | None = None) -> torch.Tensor:
        """:func:`expected_cost` of the current gates, or of given logits."""
        given = self.logits if logits is None else logits
        return expected_cost(self.probability(given), self.group_size, self.options.head_cost)

    def probability(self, logits: torch.Tensor) -> torch.Tensor:
        """P(g > 0) for given logits."""
        return open_probability(logits, self.options.temperature)

    @property
    def target(self) -> float:
        """The budget after the next step: a parabola, because little changes while most gates are open."""
        begin, end = (
            float(self.cost(torch.full_like(self.logits, logit))) for logit in (BEGIN, -LIMIT)
        )
        left = 1 - (self.step + 1) / self.options.steps
        return end + (begin - end) * left**2

    def run(self, losses: Callable[[int, Draw], dict[str, float]]) -> Iterator[dict[str, float]]:
        """Do the remaining steps.

        Args:
            losses: function of the step and of a function that draws gates. It calls ``backward`` on the
                loss of the drawn gates, and returns numbers to record.

        Yields:
            After every step its record: the numbers of ``losses``, ``target``, ``cost`` and ``penalty`` (λ).
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
            penalty = self._update_logits(gradient, target)
            self.opened += self.probability(self.logits)
            self.step += 1
            yield record | {"target": target, "cost": float(self.cost()), "penalty": penalty}

    def _update_logits(self, gradient: torch.Tensor, target: float) -> float:
        """Step along the gradient of the loss, then along the cost until the budget is kept. Return λ."""
        rate = self.options.learning_rate
        self._momentum.lerp_(gradient, 1 - MOMENTUM)
        self._squares.lerp_(gradient.square(), 1 - SQUARES)
        momentum = self._momentum / (1 - MOMENTUM ** (self.step + 1))
        squares = self._squares / (1 - SQUARES ** (self.step + 1))
        scale = squares.mean().sqrt() + EPSILON
        self.logits = (self.logits - rate * momentum / scale).clamp(-LIMIT, LIMIT)
        slope = self._slope()
        length = self._step_length(slope, target)
        self.logits = (self.logits - length * slope).clamp(-LIMIT, LIMIT)
        return length * float(scale) / rate

    def _slope(self) -> torch.Tensor:
        logits = self.logits.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.cost(logits), logits)
        return slope

    def _step_length(self, slope: torch.Tensor, target: float) -> float:
        """The smallest t ≥ 0 for which logits − t · slope cost at most the target, up to a maximum."""
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
