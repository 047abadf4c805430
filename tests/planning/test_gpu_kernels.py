"""The planner's descriptions of GPU kernels against measurements on an H200.

The figures come from the benchmarks' files in ``docs/performance``; no kernel runs here.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from megatron_hydra.config.loading import from_dict
from megatron_hydra.config.run import RunConfig
from megatron_hydra.ops.linear_rules import GATED_DELTA_RULE
from megatron_hydra.planning.hardware import Efficiency, find_gpu
from megatron_hydra.planning.models import read_model
from megatron_hydra.planning.tape import decoder
from megatron_hydra.planning.tape.delta_rule import _fla
from megatron_hydra.planning.tape.rank import Program, Rank
from megatron_hydra.planning.tape.tensors import Tape, Tensor, Work
from megatron_hydra.planning.timing import Machine
from tests.parallel.launch import ROOT
from tests.planning import cases

MEASURED = json.loads((ROOT / "docs/performance/2026-11-23_h200.json").read_text())
LATER = json.loads((ROOT / "docs/performance/2026-11-26_h200.json").read_text())
MACHINE = Machine(find_gpu("h200"), Efficiency())


def _rows(benchmark: str, peer: str) -> list[dict[str, Any]]:
    return [row for row in MEASURED[benchmark]["rows"] if row["peer"].startswith(peer)]


def _program(tokens: int, chunk: int = 1024) -> Program:
    body = cases.run_config(length=tokens, precision="bf16", loss={"chunk_tokens": chunk})
    return Program(Tape(), Rank(from_dict(RunConfig, body)), read_model("Qwen/Qwen3-1.7B"))


def _finish(tape: Tape, out: Tensor) -> None:
    root = Tensor(None, out.shape, out.size, out.edge)
    del out
    tape.backward([(root, tape.empty(root.shape, root.size))])


def _seconds(tape: Tape) -> float:
    return sum(MACHINE.seconds(work) for work in tape.work)


@pytest.mark.parametrize("row", _rows("gdn", "FLA"), ids=lambda row: str(row["size"]))
def test_gdn_kernels(row: dict[str, Any]) -> None:
    """Peak bytes without the inputs; at 128K, where launches are hidden, also the time."""
    heads, d = 14, 128
    program = _program(row["size"])
    tape = program.tape
    shapes = [(row["size"], heads, d)] * 3
    inputs = [tape.leaf(tape.empty(shape, 2))[0] for shape in shapes]
    gates = [tape.leaf(tape.empty((row["size"], heads), 4))[0] for _ in range(2)]
    before = tape.live
    tape.reset_peak()
    assert GATED_DELTA_RULE.fla is not None
    out = _fla(program, GATED_DELTA_RULE.fla, *inputs, *gates)
    root = Tensor(None, out.shape, out.size, out.edge)
    del out
    tape.backward([(root, tape.empty(root.shape, root.size))])
    assert tape.peak - before == pytest.approx(row["peak_bytes"], rel=0.05)
    if row["size"] >= 100_000:
        assert _seconds(tape) == pytest.approx(row["median_seconds"], rel=0.1)


@pytest.mark.parametrize("row", _rows("loss", "ours"), ids=lambda row: row["peer"])
def test_loss(row: dict[str, Any]) -> None:
    if "torch" in row["peer"]:
        pytest.skip("the torch passes on a GPU: not what a run uses there")
    chunk = 2048 if "2048" in row["peer"] or "2K" in row["peer"] else 1024
    program = _program(row["size"], chunk)
    tape, model = program.tape, program.model
    hidden = tape.leaf(tape.empty((row["size"], model.hidden_size), 2))[0]
    teacher = tape.empty(hidden.shape, 2)
    weight = tape.weight((model.vocab_size, model.hidden_size), 2)
    before = tape.live
    tape.reset_peak()
    out = decoder.token_loss(program, hidden, weight, teacher)
    _finish(tape, out)
    assert tape.peak - before == pytest.approx(row["peak_bytes"], rel=0.05)
    assert _seconds(tape) == pytest.approx(row["median_seconds"], rel=0.15)


def test_flash_qla_is_a_setting() -> None:
    """FlashQLA's kernels reach the share of the peak that the help names, if they can run."""
    (fla,) = (row for row in _rows("gdn", "FLA") if row["size"] == 131_072)
    (qla,) = (row for row in _rows("gdn", "FlashQLA") if row["size"] == 131_072)
    share = Efficiency().delta_rule * fla["median_seconds"] / qla["median_seconds"]
    assert share == pytest.approx(0.27, abs=0.01)
    with_it = Machine(MACHINE.gpu, dataclasses.replace(MACHINE.efficiency, flash_qla=0.27))
    for unit, ratio in (("flash_qla", 0.067 / 0.27), ("delta_rule", 1.0)):
        work = Work("forward", "gdn", unit, 1e12, 1e12, 0.0)
        assert with_it.seconds(work) == pytest.approx(ratio * MACHINE.seconds(work))


def test_attention_of_packed_documents_is_slower() -> None:
    rows = LATER["layer, 8K and 32K"]["rows"]
    dense, packed = (
        row["median_seconds"]
        for peer in ("all-FA (cuDNN)", "all-FA (varlen)")
        for row in rows
        if (row["size"], row["peer"]) == (32_768, peer)
    )
    assert Efficiency().varlen == pytest.approx(dense / packed, rel=0.03)
