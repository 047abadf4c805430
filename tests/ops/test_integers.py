"""Sizes of launches equal Triton's."""

from __future__ import annotations

import pytest

from megatron_hydra.ops.integers import cdiv, next_power_of_2

triton = pytest.importorskip("triton")


@pytest.mark.parametrize("a", [0, 1, 63, 64, 65, 8192, 524288])
@pytest.mark.parametrize("b", [1, 3, 64])
def test_cdiv(a: int, b: int) -> None:
    assert cdiv(a, b) == triton.cdiv(a, b)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 100, 151936])
def test_next_power_of_2(n: int) -> None:
    assert next_power_of_2(n) == triton.next_power_of_2(n)
