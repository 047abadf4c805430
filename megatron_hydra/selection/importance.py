"""The paper's score of a head, from the decrease of the readout by interventions. Plain NumPy.

HydraHead, equations 10 to 12. For a pair, IE = (m(x) − m(x; patched)) / (m(x) − m(x')), clipped to [0, 1]. A
capability has sub-probes. A head's effect in a role (receiver, sender) is the mean over the means of the
sub-probes. s = max(receiver, sender) · κ, where κ is the share of sub-probes in which the head exceeds
:data:`SIGNAL` in its stronger role. Scores are scaled to [0, 1] in each capability and averaged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_hydra.selection.patching import Head

SIGNAL = 0.01
"""The paper's threshold: effects above it count."""

SUB_PROBES = 5
"""Number of sub-probes of a capability with one task; each has at least two pairs."""


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
        counts: number of pairs of each task of the capability. Several tasks are the sub-probes. The pairs of
            a single task are distributed over sub-probes.
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
    """Heads that exceed the threshold in any sub-probe.

    It is the union over sub-probes, because a backup head may have an effect in only one of them.
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
        """Compute from the effects on every pair, ``[L, H, P]``, and the pairs' sub-probes ``[P]``."""
        receivers, senders = by_sub_probe(receiver, probe), by_sub_probe(sender, probe)
        r, s = receivers.mean(0), senders.mean(0)
        stronger = np.where(r >= s, receivers, senders)
        kappa = (stronger > SIGNAL).mean(0)
        return cls(r, s, kappa, np.maximum(r, s) * kappa)

    @property
    def without_kappa(self) -> np.ndarray:
        """The stronger effect itself, which orders heads with equal scores."""
        return np.maximum(self.receiver, self.sender)


def min_max(scores: np.ndarray) -> np.ndarray:
    """Scale to [0, 1]: the smallest score becomes 0, the largest 1; all become 0 if they are equal."""
    spread = scores.max() - scores.min()
    return (scores - scores.min()) / spread if spread > 0 else np.zeros_like(scores)


def gini(scores: np.ndarray) -> float:
    """Gini coefficient of scores ≥ 0: 0 if all are equal, near 1 if one score has nearly the whole sum."""
    ordered = np.sort(scores.reshape(-1))
    total, count = ordered.sum(), len(ordered)
    if total <= 0:
        return 0.0
    places = np.arange(1, count + 1)
    return float((2 * places - count - 1) @ ordered / (count * total))
