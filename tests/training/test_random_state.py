"""All generators of a process are captured and restored."""

from __future__ import annotations

import random

import numpy as np
import torch

from megatron.core import tensor_parallel  # isort: skip

from megatron_hydra.training.random_state import capture_random_state, restore_random_state


def _draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.standard_normal()),
        float(torch.rand(())),
    ]


def test_restored_generators_repeat_themselves(one_rank: None) -> None:
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    random.gauss(0, 1)  # Python's generator then stores a second Gaussian
    state = capture_random_state()
    first = _draw()
    changed = capture_random_state()
    restore_random_state(state)
    assert _draw() == first
    assert state.shape == changed.shape
    assert not torch.equal(state, changed)
