"""The chain of the README by its public commands, on GPUs in bf16 with FLA's kernels.

A tiny teacher retrieves; its heads are large enough for FLA's kernels (:mod:`tests.gpu.teacher`).
"""

from __future__ import annotations

import math

from tests.gpu.chain import STOP_EXIT
from tests.gpu.needing import needs
from tests.training.tiny import OF_THE_CLOCK

SAMPLES_OFF = 0.05
"""Share of answers that may differ between two computations in bf16, because near-ties change."""


def lines_without_clock(lines):
    return [{k: v for k, v in line.items() if k not in OF_THE_CLOCK} for line in lines]


def _losses(lines):
    losses = [line["loss"] for line in lines]
    assert all(loss is not None and math.isfinite(loss) for loss in losses)
    assert not any(line.get("skipped") for line in lines)
    return losses


def _assert_learns(lines, steps, note):
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    losses = _losses(lines)
    quarter = max(1, steps // 4)
    first, last = (sum(part) / quarter for part in (losses[:quarter], losses[-quarter:]))
    assert last < first
    note(loss=f"{losses[0]:.4f} → {losses[-1]:.4f}", memory_gb=f"{lines[-1]['memory_gb']:.2f}")


@needs("convert")
def test_convert(result):
    """``--verify`` compares every tensor and transformers' logits."""
    result("convert")


@needs("select")
def test_select(result, note):
    heads = result("select")["full_attention_heads"]
    assert sum(map(len, heads)) == 4  # of 32, at 7:1
    note(FA_heads=heads)


@needs("select", "select_2")
def test_select_on_two_gpus_chooses_the_same_heads(result, note):
    one, two = result("select"), result("select_2")
    assert one["full_attention_heads"] == two["full_attention_heads"]
    note(FA_heads=two["full_attention_heads"])


@needs("align")
def test_align(result, suite, note):
    _assert_learns(result("align"), suite.chain.sizes.steps["align"], note)


@needs("distill")
def test_distill_stopped_by_sigterm_and_resumed(result, suite, note):
    lines = result("distill")
    _assert_learns(lines, suite.chain.sizes.steps["distill"], note)
    events = suite.chain.events("distill")
    names = [event["event"] for event in events]
    assert names[0] == "start" and names[-1] == "end"
    stop = names.index("stop")
    assert names.count("stop") == 1 and names[stop + 1] == "resume"
    saves = [e for e in events[:stop] if e["event"] == "save" and e["step"] == events[stop]["step"]]
    assert len(saves) == 1  # once
    assert events[stop]["step"] == events[stop + 1]["step"]
    note(
        stopped_after_step=events[stop]["step"], exit_status=STOP_EXIT,
        seconds_from_signal=f"{suite.chain.seconds_to_stop:.1f}", of_them_saving=saves[0]["seconds"],
    )  # fmt: skip


@needs("distill", "distill_whole")
def test_resuming_is_bit_equal_to_not_stopping(result, note):
    """With ``deterministic=true``, every logged number of every step is equal."""
    stopped, whole = result("distill"), result("distill_whole")
    assert lines_without_clock(stopped) == lines_without_clock(whole)
    note(steps_compared=len(whole))


@needs("distill_killed", "distill_whole")
def test_sigkill_during_a_save_loses_nothing(result, note):
    killed, whole = result("distill_killed"), result("distill_whole")
    assert lines_without_clock(killed) == lines_without_clock(whole)
    note(steps_compared=len(whole))


@needs("same_end")
def test_interrupted_runs_end_in_the_same_bits(result, suite, note):
    """Weights, optimizer and generators of the last checkpoint are equal."""
    assert result("same_end") == {"distill": [], "distill_killed": []}
    note(tensors="all equal")


@needs("finetune")
def test_finetune(result, suite, note):
    lines = result("finetune")
    assert len(_losses(lines)) == suite.chain.sizes.steps["finetune"]
    note(loss=f"{lines[0]['loss']:.4f} → {lines[-1]['loss']:.4f}")


@needs("export")
def test_export(result, suite):
    """``--verify`` compares every tensor, and logits of both models."""
    result("export")
    assert (suite.chain.export / "modeling_hydrahead.py").is_file()


@needs("evaluate_hf", "evaluate_checkpoint")
def test_export_and_checkpoint_answer_alike(result, suite, note):
    export, checkpoint = result("evaluate_hf"), result("evaluate_checkpoint")
    _assert_alike(export, checkpoint)
    if not suite.machine.is_dry_run:  # which trains too little
        assert export["128"] > 0.5
    note(export=export, checkpoint=checkpoint)


@needs("evaluate_checkpoint", "evaluate_2")
def test_two_gpus_evaluate_as_one(result, note):
    one, two = result("evaluate_checkpoint"), result("evaluate_2")
    _assert_alike(one, two)
    note(one=one, two=two)


def _assert_alike(one, other):
    assert one.keys() == other.keys() == {"128", "256"}
    for length in one:
        assert abs(one[length] - other[length]) <= SAMPLES_OFF, (one, other)
