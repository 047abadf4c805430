"""Every layout computes what one rank computes: loss and every gradient, in fp32."""

from __future__ import annotations

import json

import pytest

from tests.parallel.launch import forked
from tests.parallel.layouts import FAST, FULL


def _check(selection: str, expected: int, timeout: float) -> None:
    output = forked("tests.parallel.layouts", 4, selection, timeout=timeout)
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(results) == expected
    wrong = [r for r in results if not (r["loss_error"] < 1e-5 and r["gradient_error"] < 1e-4)]
    assert not wrong, "\n".join(map(json.dumps, wrong))


@pytest.mark.parallel
def test_chosen_layouts_equal_one_rank():
    _check("fast", len(FAST), timeout=280)


@pytest.mark.parallel
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_layouts_equal_one_rank():
    _check("full", len(FULL), timeout=1700)
