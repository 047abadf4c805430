"""Equations 10 to 12 on numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_hydra.selection.importance import (
    Importance,
    by_sub_probe,
    gini,
    intervention_effects,
    min_max,
    passing,
    sub_probes,
)


def test_effects_are_clipped_for_every_pair() -> None:
    fall = np.array([[[2.0, -1.0, 9.0]]])
    np.testing.assert_allclose(
        intervention_effects(fall, np.array([4.0, 4.0, 3.0])), [[[0.5, 0.0, 1.0]]]
    )


def test_several_tasks_are_sub_probes_and_a_single_task_is_split() -> None:
    assert sub_probes([2, 1, 3]).tolist() == [0, 0, 1, 2, 2, 2]
    assert np.bincount(sub_probes([40])).tolist() == [8] * 5
    assert np.bincount(sub_probes([6])).tolist() == [2] * 3
    assert sub_probes([1]).tolist() == [0]


def test_kappa_is_the_share_of_sub_probes_with_a_signal_in_the_stronger_role() -> None:
    probe = np.array([0, 0, 1, 1])
    # Head 0 receives in one sub-probe and sends weakly in both; head 1 sends in both; head 2 is below 0.01.
    receiver = np.array([[[0.4, 0.4, 0.0, 0.0], [0.0] * 4, [0.009] * 4]])
    sender = np.array([[[0.1] * 4, [0.5, 0.3, 0.1, 0.1], [0.0] * 4]])
    np.testing.assert_allclose(by_sub_probe(receiver, probe)[:, 0, 0], [0.4, 0.0])
    found = Importance.of(receiver, sender, probe)
    np.testing.assert_allclose(found.receiver, [[0.2, 0.0, 0.009]])
    np.testing.assert_allclose(found.sender, [[0.1, 0.25, 0.0]])
    np.testing.assert_allclose(found.kappa, [[0.5, 1.0, 0.0]])
    np.testing.assert_allclose(found.score, [[0.2 * 0.5, 0.25, 0.0]])
    np.testing.assert_allclose(found.without_kappa, [[0.2, 0.25, 0.009]])
    assert passing(receiver, probe) == [(0, 0)]
    assert passing(sender, probe) == [(0, 0), (0, 1)]


def test_sub_probes_have_equal_weight_for_any_number_of_pairs() -> None:
    effects = np.array([[[1.0, 0.0, 0.0, 0.0]]])
    found = Importance.of(effects, 0 * effects, np.array([0, 1, 1, 1]))
    assert found.receiver.item() == pytest.approx(0.5)


def test_min_max() -> None:
    np.testing.assert_allclose(min_max(np.array([[1.0, 3.0], [2.0, 1.0]])), [[0, 1], [0.5, 0]])
    np.testing.assert_array_equal(min_max(np.full((2, 2), 0.3)), np.zeros((2, 2)))


def test_gini() -> None:
    assert gini(np.full(8, 0.2)) == pytest.approx(0)
    assert gini(np.array([0.0, 0, 0, 5])) == pytest.approx(0.75)
    assert gini(np.array([1.0, 3])) == pytest.approx(0.25)
    assert gini(np.zeros(4)) == 0
