"""The paper's score of a head, from what interventions took of the readout. Plain NumPy.

HydraHead, equations 10 to 12. For a pair, IE = (m(x) − m(x; patched)) / (m(x) − m(x')), clipped to [0, 1]. A
capability has sub-probes; a head's effect in a role (receiver, sender) is the mean of its sub-probes'
means. s = max(receiver, sender) · κ, where κ is the share of sub-probes in which the head passes
:data:`SIGNAL` in its stronger role. Scores are brought to [0, 1] in each capability and averaged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_hydra.selection.patching import Head

SIGNAL = 0.01
"""An effect above it counts: the paper's threshold."""

SUB_PROBES = 5
"""A capability of one task is cut into so many sub-probes, of two pairs at least."""


def intervention_effects(fall: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """IE of every pair, in [0, 1].

    Args:
        fall: m(x) − m(x; patched), ``[..., P]``.
        gap: m(x) − m(x'), ``[P]``, positive.
    """
    return np.clip(fall / gap, 0.0, 1.0)


def sub_probes(counts: Sequence[int]) -> np.ndarray:
    """The sub-probe of every pair, ``[P]``.

    Args:
        counts: pairs of each of the capability's tasks. Several tasks are the sub-probes; the pairs of
            a single one are dealt out.
    """
    if len(counts) > 1:
        return np.repeat(np.arange(len(counts)), counts)
    return np.arange(counts[0]) % max(1, min(SUB_PROBES, counts[0] // 2))


def by_sub_probe(effects: np.ndarray, probe: np.ndarray) -> np.ndarray:
    """Mean effect in each sub-probe that has a pair, ``[S, L, H]``.

    Args:
        effects: ``[L, H, P]``.
        probe: sub-probe of each pair, ``[P]``.
    """
    return np.stack([effects[..., probe == s].mean(-1) for s in np.unique(probe)])


def passing(effects: np.ndarray, probe: np.ndarray) -> list[Head]:
    """Heads that pass the threshold in any sub-probe.

    The union over sub-probes: a backup head may show in one of them only.
    """
    found = by_sub_probe(effects, probe).max(0) > SIGNAL
    return [(int(layer), int(head)) for layer, head in np.argwhere(found)]


@dataclasses.dataclass(frozen=True)
class Importance:
    """One capability's scores, ``[L, H]`` each.

    Attributes:
        receiver, sender: mean effect in each role.
        kappa: share of sub-probes with a signal in the stronger role.
        score: max(receiver, sender) · κ.
    """

    receiver: np.ndarray
    sender: np.ndarray
    kappa: np.ndarray
    score: np.ndarray

    @classmethod
    def of(cls, receiver: np.ndarray, sender: np.ndarray, probe: np.ndarray) -> Importance:
        """From the effects on every pair, ``[L, H, P]``, and the pairs' sub-probes ``[P]``."""
        receivers, senders = by_sub_probe(receiver, probe), by_sub_probe(sender, probe)
        r, s = receivers.mean(0), senders.mean(0)
        stronger = np.where(r >= s, receivers, senders)
        kappa = (stronger > SIGNAL).mean(0)
        return cls(r, s, kappa, np.maximum(r, s) * kappa)

    @property
    def without_kappa(self) -> np.ndarray:
        """The stronger effect itself: orders heads whose scores are equal."""
        return np.maximum(self.receiver, self.sender)


def min_max(scores: np.ndarray) -> np.ndarray:
    """To [0, 1]: the smallest score 0, the largest 1; all 0 where they are equal."""
    spread = scores.max() - scores.min()
    return (scores - scores.min()) / spread if spread > 0 else np.zeros_like(scores)


def gini(scores: np.ndarray) -> float:
    """Gini coefficient of scores that are not negative: 0 all equal, towards 1 one has all; 0 if all are 0."""
    ordered = np.sort(scores.reshape(-1))
    total, count = ordered.sum(), len(ordered)
    if total <= 0:
        return 0.0
    places = np.arange(1, count + 1)
    return float((2 * places - count - 1) @ ordered / (count * total))
