"""Initial values of Gated DeltaNet heads from the teacher's attention (``--init statistics``).

For every query head, on calibration text:

*half-life*
    d̄ is the attention-weighted mean distance between a query and the tokens that it attends to. A state that
    decays by α per token gives a token at distance Δ the weight α^Δ. α is chosen so that its mean distance,
    over the same queries and keys, is d̄. For an infinite text, d̄ = α / (1 − α).
*write*
    r_t is what distance does not explain: the attention that token t receives from all later queries, divided
    by what it would receive from weights α^Δ. A ridge regression of ln r_t on the layer's input x_t gives W_b.
    So β_t = σ(W_b x_t) is larger for tokens that the head attends to, and 1/2 for average tokens.

Both omit the first token, because heads put attention without a target there. A query has the weight of its
attention to other tokens. Value scale and output gate do not use these statistics [choice]: γ already has the
teacher's RMS (:func:`~.student.calibrate_gamma`), and a norm follows the gate, which cancels any common scale
of a head's channels.

The idea is that of Taylor-Calibrate (arXiv 2606.16429), of which we know only the abstract; the formulas are
ours.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_hydra.errors import HydraError

GRID = 97
"""The tested half-lives, evenly spaced in the logarithm; values between them are interpolated."""

RIDGE = 0.1
"""Penalty of the regression: this share of each channel's mean square is added to it."""

LARGEST_LOG_RATIO = 4.0
"""Bound of |ln r_t|, which keeps the targets of β within 0.02 … 0.98."""

_RECEIVED_FLOOR = 1e-3
"""Attention, in units of queries, added to numerator and denominator of r_t, so that unseen tokens have finite
ratios."""


@dataclasses.dataclass(frozen=True)
class HeadStatistics:
    """Initial values of GDN heads, for all query heads of the teacher.

    Attributes:
        half_life: ``[L, H]`` fp64, tokens.
        write: ``[L, H, D]`` fp32, rows of W_b.
        distance: ``[L, H]`` fp64, mean distance in tokens; NaN if a head attends only to the first token.
    """

    half_life: torch.Tensor
    write: torch.Tensor
    distance: torch.Tensor


@torch.no_grad()
def measure_heads(
    hf_model: Any, token_batches: Sequence[torch.Tensor], half_life: tuple[float, float]
) -> HeadStatistics:
    """Measure every head of a dense model.

    Args:
        hf_model: a transformers model of any supported dense family, with or without LM head; it runs with
            eager attention.
        token_batches: int64 ``[B, S]`` tensors without padding.
        half_life: smallest and largest half-life of a head, in tokens. A head whose mean distance exceeds that
            of uniform attention gets the largest.

    Raises:
        HydraError: no sequence of at least three tokens, or attention that is not finite.
    """
    batches = [tokens for tokens in token_batches if tokens.numel() and tokens.shape[1] > 2]
    if not batches:
        raise HydraError(
            "init=statistics needs calibration sequences of three tokens or more, to see how far "
            "back heads look: give some with --calibration-file"
        )
    layers = getattr(hf_model, "model", hf_model).layers
    looks = [_Distances() for _ in layers]
    _watch(hf_model, batches, lambda layer, x, weights: looks[layer].add(weights))
    distance = torch.stack([look.mean() for look in looks])
    lives = torch.stack([look.half_life(*half_life) for look in looks])
    fits = [_Writes(life) for life in lives]
    _watch(hf_model, batches, lambda layer, x, weights: fits[layer].add(x, weights))
    return HeadStatistics(lives, torch.stack([fit.rows() for fit in fits]), distance)


def _watch(
    hf_model: Any,
    batches: Sequence[torch.Tensor],
    see: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> None:
    """Run the model; ``see(layer, x [B, S, D], attention [B, H, S, S])`` for every layer and batch."""
    backbone = getattr(hf_model, "model", hf_model)
    before = hf_model.config._attn_implementation

    def hook(
        index: int, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        weights = output[1]
        if not weights.isfinite().all():
            raise HydraError(f"calibration: layer {index} has attention that is not finite")
        see(index, x, weights)
        return (output[0], None, *output[2:])  # those of all layers together would fill the memory

    handles = [
        layer.self_attn.register_forward_hook(functools.partial(hook, index), with_kwargs=True)
        for index, layer in enumerate(backbone.layers)
    ]
    try:
        hf_model.set_attn_implementation("eager")  # only eager attention returns its weights
        for tokens in batches:
            backbone(input_ids=tokens.to(hf_model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        hf_model.set_attn_implementation(before)


def _beyond_first(weights: torch.Tensor) -> torch.Tensor:
    """Attention of queries 1 … S−1 on keys 1 … S−1: ``[B, H, S, S]`` → ``[B, H, S−1, S−1]`` fp32."""
    return weights[:, :, 1:, 1:].float()


class _Distances:
    """Sums over the text of one layer's attention by distance."""

    def __init__(self) -> None:
        self.moved = torch.zeros(0)  # [H] attention times distance
        self.spent = torch.zeros(0, 0)  # [H, longest − 1] attention by the query's place

    def add(self, weights: torch.Tensor) -> None:
        """Attention ``[B, H, S, S]`` of a batch."""
        seen = _beyond_first(weights)
        places = torch.arange(seen.shape[-1], device=seen.device)
        distance = (places[:, None] - places[None, :]).clamp(min=0).float()
        moved = (seen * distance).sum((0, 2, 3)).double().cpu()
        spent = seen.sum((0, 3)).double().cpu()
        if not self.moved.numel():
            self.moved, self.spent = torch.zeros_like(moved), spent.new_zeros(len(moved), 0)
        missing = spent.shape[1] - self.spent.shape[1]
        if missing > 0:
            self.spent = torch.nn.functional.pad(self.spent, (0, missing))
        self.moved += moved
        self.spent[:, : spent.shape[1]] += spent

    def mean(self) -> torch.Tensor:
        """``[H]`` mean distance in tokens."""
        return self.moved / self.spent.sum(1)

    def half_life(self, least: float, most: float) -> torch.Tensor:
        """``[H]`` half-lives whose exponential weights have the same mean distance."""
        grid = torch.exp(torch.linspace(math.log(least), math.log(most), GRID, dtype=torch.float64))
        means = mean_distances(grid, self.spent.shape[1])  # [GRID, longest − 1]
        expected = self.spent @ means.T / self.spent.sum(1, keepdim=True)  # [H, GRID], ascending
        expected = expected.nan_to_num(0.0)
        # A head that attends only to the first token has no distance; it gets the longest half-life.
        wanted = self.mean().nan_to_num(float("inf"))[:, None]
        after = torch.searchsorted(expected, wanted).clamp(1, GRID - 1)
        low, high = expected.gather(1, after - 1), expected.gather(1, after)
        share = ((wanted - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        log = grid.log()
        return torch.exp(log[after - 1] + share * (log[after] - log[after - 1])).squeeze(1)


def mean_distances(half_life: torch.Tensor, length: int) -> torch.Tensor:
    """Mean distance of weights 2^(−Δ / half-life), over the keys up to each of ``length`` places.

    Args:
        half_life: ``[n]`` fp64, tokens.

    Returns:
        ``[n, length]``; ascending along both axes.
    """
    distance = torch.arange(length, dtype=torch.float64)
    weights = torch.exp2(-distance / half_life[:, None])
    return (weights * distance).cumsum(1) / weights.cumsum(1)


class _Writes:
    """The regression of one layer's W_b.

    Args:
        half_life: ``[H]`` fp64, of the layer's heads.
    """

    def __init__(self, half_life: torch.Tensor) -> None:
        self.half_life = half_life
        self.squares: torch.Tensor = torch.zeros(0)  # [D, D]
        self.products: torch.Tensor = torch.zeros(0)  # [D, H]

    def add(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        """Inputs ``[B, S, D]`` of the layer and its attention ``[B, H, S, S]``."""
        log_ratio = self._log_ratio(_beyond_first(weights))
        rows = x[:, 1:].flatten(0, 1).float()
        targets = log_ratio.transpose(1, 2).flatten(0, 1)
        squares, products = (rows.T @ rows).cpu(), (rows.T @ targets).cpu()
        self.squares = self.squares + squares if self.squares.numel() else squares
        self.products = self.products + products if self.products.numel() else products

    def _log_ratio(self, seen: torch.Tensor) -> torch.Tensor:
        """Ln r ``[B, H, S−1]`` of every token."""
        length = seen.shape[-1]
        places = torch.arange(length, device=seen.device)
        distance = (places[:, None] - places[None, :]).float()
        lives = self.half_life.to(seen.device, torch.float32)[:, None, None]
        by_distance = torch.exp2(-distance.clamp(min=0) / lives).tril()
        by_distance = by_distance / by_distance.sum(-1, keepdim=True)  # [H, S−1, S−1]
        spent = seen.sum(-1)
        expected = torch.einsum("bhq,hqk->bhk", spent, by_distance)
        ratio = (seen.sum(2) + _RECEIVED_FLOOR) / (expected + _RECEIVED_FLOOR)
        return ratio.log().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)

    def rows(self) -> torch.Tensor:
        """W_b, ``[H, D]`` fp32."""
        squares = self.squares.double()
        penalty = RIDGE * squares.diagonal().clamp_min(1e-12 * squares.diagonal().max())
        system = squares + torch.diag(penalty)
        return torch.linalg.solve(system, self.products.double()).T.float()
