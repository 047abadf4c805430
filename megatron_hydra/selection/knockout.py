"""Knock out several heads together: replace their outputs by means; all later layers react.

The positive control of a selection and the knockout curve use it. A mean over tokens and prompts has no
information on the position of a fact, and keeps the scale of the stream.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import torch

from megatron_hydra.selection.patching import Head
from megatron_hydra.selection.prompts import PromptBatch
from megatron_hydra.selection.runner import DecoderRunner


@torch.no_grad()
def output_sums(runner: DecoderRunner, batch: PromptBatch) -> torch.Tensor:
    """Head outputs summed over all tokens of the clean runs, float64 ``[L, H, d]``.

    Divided by the sum of :func:`num_tokens`, the sum over all batches gives the means.
    """
    real = _is_real(batch)
    sums = []
    for _, z in _clean_run(runner, batch, {}, None):
        sums.append((z.double() * real.to(z.device)[..., None, None]).sum((0, 1)).cpu())
    return torch.stack(sums)


def num_tokens(batch: PromptBatch) -> int:
    """Number of tokens of a batch's clean runs, without padding."""
    return int(_is_real(batch).sum())


@dataclasses.dataclass(frozen=True)
class Knockout:
    """Result of a clean run without some heads.

    Attributes:
        m: the span readout, ``[P]`` float64.
        right: whether every token of the answer is the most likely one, ``[P]`` bool.
    """

    m: torch.Tensor
    right: torch.Tensor


@torch.no_grad()
def knock_out(
    runner: DecoderRunner, batch: PromptBatch, heads: Sequence[Head], means: torch.Tensor
) -> Knockout:
    """Run the clean prompts without some heads.

    Args:
        means: mean outputs of all heads, ``[L, H, d]``.
    """
    out: dict[int, list[int]] = {}
    for layer, head in heads:
        out.setdefault(layer, []).append(head)
    x, _ = collections.deque(_clean_run(runner, batch, out, means), maxlen=1).pop()
    x = batch.at_answers(x)
    m = runner.readout(x, runner.readout_direction(batch))
    return Knockout(m.double().cpu(), batch.answered(runner.logits(x).argmax(-1).cpu()))


def _clean_run(
    runner: DecoderRunner,
    batch: PromptBatch,
    out: dict[int, list[int]],
    means: torch.Tensor | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for each layer the stream after it ``[P, T, D]`` and its head outputs ``[P, T, H, d]``."""
    positions = torch.arange(batch.clean.shape[1], device=runner.device)
    x = runner.embed(batch.clean)
    for layer in range(runner.num_layers):
        x = x.to(runner.device_of(layer))
        here = positions.to(x.device)
        normed = runner.attention_input(layer, x)
        k, v = runner.keys(layer, normed, here), runner.values(layer, normed)
        z = runner.attend(layer, runner.queries(layer, normed, here), k, v, here)
        if layer in out:
            assert means is not None
            z = z.clone()
            z[:, :, out[layer]] = means[layer][out[layer]].to(z)
        x = runner.add_mlp(layer, x + runner.output_projection(layer, z))
        yield x, z


def _is_real(batch: PromptBatch) -> torch.Tensor:
    """Mask of the clean runs' real tokens, ``[P, T]`` bool."""
    return torch.arange(batch.clean.shape[1]) <= batch.answer_positions[:, -1:]
