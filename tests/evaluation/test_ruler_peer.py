"""Our generators and scorer against those of NVIDIA/RULER, if a checkout exists."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "ruler_peer.py"


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("RULER"),
    reason="needs $RULER, a checkout of NVIDIA/RULER, and $RULER_SITE with its packages",
)
@pytest.mark.timeout(3600)
def test_properties_and_scores_are_rulers(capsys):
    spec = importlib.util.spec_from_file_location("ruler_peer", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    status = module.main(["--lengths", "4096", "--samples", "3", "--predictions", "100"])
    assert status == 0, capsys.readouterr().out
