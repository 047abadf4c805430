"""Tensors of host integers: the same object for the same integers, and held by whoever asks for it."""

from __future__ import annotations

import torch

from megatron_hydra.ops.device_cache import int_tensor, kept


def test_the_same_integers_are_the_same_tensor():
    first = int_tensor((1, 2, 3), torch.int32, "cpu")
    assert first.tolist() == [1, 2, 3] and first.dtype == torch.int32
    assert int_tensor((1, 2, 3), torch.int32, "cpu") is first
    assert int_tensor((1, 2, 3), torch.int64, "cpu").dtype == torch.int64


def test_what_is_asked_for_inside_a_block_is_kept_whether_it_is_new_or_not():
    old = int_tensor((4, 5), torch.int64, "cpu")
    with kept() as tensors:
        new = int_tensor((6, 7, 8), torch.int64, "cpu")
        int_tensor((4, 5), torch.int64, "cpu")
    int_tensor((9,), torch.int64, "cpu")
    assert [id(tensor) for tensor in tensors] == [id(new), id(old)]
