"""Tensors of host integers: the same object for the same integers."""

from __future__ import annotations

import torch

from megatron_hydra.ops.device_cache import int_tensor


def test_the_same_integers_are_the_same_tensor():
    first = int_tensor((1, 2, 3), torch.int32, "cpu")
    assert first.tolist() == [1, 2, 3] and first.dtype == torch.int32
    assert int_tensor((1, 2, 3), torch.int32, "cpu") is first
    assert int_tensor((1, 2, 3), torch.int64, "cpu").dtype == torch.int64
