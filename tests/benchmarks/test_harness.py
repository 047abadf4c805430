"""What the benchmarks' numbers rest on: turns, ratios within a round, failures, files."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

from benchmarks import _harness as harness

CPU = torch.device("cpu")


def arguments(output=None) -> argparse.Namespace:
    return argparse.Namespace(repeats=3, warmup=1, output=output, device="cpu")


def test_sizes_are_read_and_named():
    assert harness.sizes_of("8K,512") == [8192, 512]
    assert [harness.size_name(size) for size in (8192, 1000)] == ["8K", "1000"]
    with pytest.raises(argparse.ArgumentTypeError, match="8M"):
        harness.sizes_of("8M")


def test_a_ratio_is_taken_within_rounds():
    # The second round is ten times slower for both: the machine's doing, not a peer's.
    ratio = harness.Ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.2)
    assert math.isnan(harness.Ratio([], []).median)


def test_peers_take_turns():
    calls = []
    peers = {name: lambda name=name: calls.append(name) for name in "ab"}
    samples = harness.time_in_turns(peers, CPU, repeats=3, warmup=1)
    assert calls == ["a", "b", *"ab" * 3]
    assert all(len(sample.wall) == 3 for sample in samples.values())


def test_one_failing_peer_does_not_stop_the_others():
    def too_large():
        raise torch.OutOfMemoryError("no room")

    samples = harness.time_in_turns({"a": too_large, "b": lambda: None}, CPU, 2, 1)
    assert samples["a"].failure == "OOM"
    assert not samples["a"].wall
    assert len(samples["b"].wall) == 2


def test_memory_of_a_call_is_seen():
    def allocate():
        torch.ones(64 << 20, dtype=torch.uint8).add_(1)

    assert 60 << 20 < harness.measured_memory(allocate, CPU) < 90 << 20


def test_a_report_is_saved_after_every_size_and_drawn(tmp_path):
    report = harness.Report("some", arguments(tmp_path), CPU, {"a over b": ("a", "b")})
    for size in (1024, 2048):
        report.measure(size, {"a": lambda: sum(range(20000)), "b": lambda: sum(range(10000))})
        saved = json.loads((tmp_path / "some.json").read_text())
        assert {row["size"] for row in saved["rows"]} >= {size}
    report.finish()
    assert saved["ratios"][0]["label"] == "a over b"
    assert saved["machine"]["device"].startswith("CPU")
    assert (tmp_path / "some.png").stat().st_size > 1000
