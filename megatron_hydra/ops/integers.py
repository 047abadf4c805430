"""Sizes of launches. Triton's functions of these names take 4 µs a call, and a step makes 24 a layer."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not less than ``n`` ≥ 1."""
    return 1 << (n - 1).bit_length()
