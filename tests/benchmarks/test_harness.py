"""How benchmarks measure: peers take turns, ratios are within a round, failures and files are reported."""

from __future__ import annotations

import argparse
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import _harness as harness
from benchmarks.layer import fastest
from megatron_hydra.errors import HydraError

CPU = torch.device("cpu")


def arguments(output=None) -> argparse.Namespace:
    return argparse.Namespace(repeats=3, warmup=1, output=output, device="cpu")


def test_sizes_are_read_and_named():
    assert harness.sizes_of("8K,512") == [8192, 512]
    assert [harness.size_name(size) for size in (8192, 1000)] == ["8K", "1000"]
    with pytest.raises(argparse.ArgumentTypeError, match="8M"):
        harness.sizes_of("8M")


def test_a_ratio_is_taken_within_rounds():
    # The second round is ten times slower for both peers, as on a busy machine.
    ratio = harness.Ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.2)
    assert math.isnan(harness.Ratio([], []).median)
    assert str(ratio) == "2.00 (2.00..2.20)"
    assert str(harness.Ratio([0.000484], [1.0])) == "0.00048 (0.00048..0.00048)"


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


def test_a_peer_that_fails_in_a_timed_round_has_no_timings_and_stops_no_other():
    calls = []

    def fails_third():
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")

    samples = harness.time_in_turns({"a": fails_third, "b": lambda: None}, CPU, 4, 1)
    assert samples["a"].failure == "OOM"
    assert not samples["a"].wall
    assert not samples["a"].cpu
    assert len(calls) == 3
    assert len(samples["b"].wall) == 4


def test_memory_of_a_call_is_its_peak():
    def two_blocks_then_three():
        first = torch.ones(2 << 20, dtype=torch.uint8)
        del first
        return torch.ones(3 << 20, dtype=torch.uint8)

    for _ in range(2):  # the C library keeps freed blocks; they do not count
        peak = harness.measured_memory(two_blocks_then_three, CPU)
        assert 3 << 20 <= peak < (3 << 20) + 1000


def test_the_best_peer_is_the_one_with_the_least_median():
    samples = {name: harness.Sample() for name in ("failed", "slow", "quick")}
    samples["slow"].wall, samples["quick"].wall = [2.0, 2.0, 0.1], [1.0, 1.0, 3.0]
    assert fastest(samples) == "quick"
    assert fastest({"failed": samples["failed"]}) == ""


def test_the_reported_delta_rule_is_the_one_that_fla_dispatched(monkeypatch):
    assert harness.used_delta_rule("torch") == "torch"
    logged: set[str] = {"gated_delta_rule:chunk:triton_ascend:fail"}
    registry = {"gated_delta_rule": SimpleNamespace(_logged=logged)}
    backends = SimpleNamespace(_operation_registries=registry)
    monkeypatch.setitem(sys.modules, "fla.backends", backends)
    assert harness.used_delta_rule("fla") == "fla (Triton)"
    logged.add("gated_delta_rule:chunk:flash_qla")
    assert harness.used_delta_rule("fla") == "fla (flash_qla)"


def test_a_cpu_measurement_refuses_other_devices():
    assert harness.cpu_only(argparse.Namespace(device="auto"), "some") == CPU
    with pytest.raises(HydraError, match="--device cuda"):
        harness.cpu_only(argparse.Namespace(device="cuda"), "some")


def test_a_report_is_saved_after_every_size_and_drawn(tmp_path):
    report = harness.Report("some", arguments(tmp_path), CPU, {"a over b": ("a", "b")})
    for size in (1024, 2048):
        report.measure(size, {"a": lambda: sum(range(20000)), "b": lambda: sum(range(10000))})
        report.ran(attention="torch")
        saved = json.loads((tmp_path / "some.json").read_text())
        assert {row["size"] for row in saved["rows"]} >= {size}
    report.finish()
    assert saved["ratios"][0]["label"] == "a over b"
    assert saved["machine"]["device"].startswith("CPU")
    assert saved["ran"] == {"attention": "torch"}
    assert (tmp_path / "some.png").stat().st_size > 1000
