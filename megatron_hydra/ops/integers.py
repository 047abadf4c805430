"""Integers for sizes of launches and blocks. Triton's functions of these names take 4 µs a call on the host,
and a training step makes 24 calls a layer.
"""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not less than ``n`` ≥ 1."""
    return 1 << (n - 1).bit_length()
