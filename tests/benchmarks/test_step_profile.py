"""The profile of a step and the search for differences: their parts, and a toy run of both."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from benchmarks import _models as models
from benchmarks import repeatability, step_profile
from megatron_hydra.config.run import BatchConfig, DataConfig, RunConfig

CONFIG = RunConfig(
    data=DataConfig(sequence_length=64, packing="split_long"), batch=BatchConfig(16, 16)
)
TOY = ["--device", "cpu", "--tiny", "--documents", "2", "--length", "32", "--verbs", "align"]


def event(category: str, name: str, start: float, length: float, thread: int = 1, **args):
    return {"cat": category, "name": name, "ts": start, "dur": length, "tid": thread, "args": args}


@pytest.fixture
def trace() -> step_profile.Trace:
    """Two steps of 100 µs: two kernels that overlap, a copy, and a wait; one launch inside two operations."""
    return step_profile.Trace(
        [
            event("cpu_op", "_FusionTailBackward", 0, 40),
            event("cpu_op", "aten::empty", 5, 10),
            event("cuda_runtime", "cudaLaunchKernel", 20, 10, correlation=1),
            event("cpu_op", "aten::mm", 50, 20),
            event("cuda_runtime", "cudaLaunchKernel", 55, 5, correlation=2),
            event("cuda_runtime", "cudaStreamSynchronize", 80, 30),
            event("kernel", "_backward_kernel", 100, 20, thread=7, correlation=1),
            event("kernel", "nvjet_tst_192x192", 110, 30, thread=8, correlation=2),
            event("gpu_memcpy", "Memcpy DtoH", 150, 10, thread=7),
            event("gpu_user_annotation", "step", 100, 60, thread=7),
            {"ph": "M", "name": "no time"},
        ],
        steps=2,
        seconds=200e-6,
    )


def test_kernels_are_grouped_by_name_and_by_the_node_that_launched_them(trace):
    assert trace.by_group() == {
        "matmul": (pytest.approx(15e-6), 0.5),
        "our kernels: fusion tail": (pytest.approx(10e-6), 0.5),
        "copies, fills": (pytest.approx(5e-6), 0.5),
    }
    assert "_backward_kernel < _FusionTailBackward" in trace.by_kernel()


def test_time_of_the_device_counts_streams_once(trace):
    assert trace.busy_seconds() == pytest.approx((40 + 10) * 1e-6 / 2)
    assert trace.waited_seconds() == pytest.approx(15e-6)
    assert trace.launches() == 1.5


def test_time_of_an_operation_is_without_those_inside_it(trace):
    own = trace.by_operation()
    assert own["_FusionTailBackward"] == (pytest.approx(10e-6), 0.5)  # 40 − 10 − 10, over two steps
    assert own["cudaLaunchKernel"] == (pytest.approx(7.5e-6), 1.0)


def test_the_table_names_every_part(trace):
    text = step_profile.as_text("align", trace, {"place:1 read": 3}, 10)
    assert "device busy 0.0 ms" in text
    assert "    3  place:1 read" in text
    assert "our kernels: fusion tail" in text


@pytest.mark.parametrize("equal", [False, True])
def test_batches_are_packed_as_in_training(equal):
    batches = list(itertools.islice(step_profile.packed_batches(CONFIG, 50, equal, seed=0), 3))
    for batch in batches:
        edges = set(batch.cu_seqlens)
        assert edges >= set(range(0, 16 * 64 + 1, 64))  # no document crosses a sequence
        assert (len(edges) == 17) is equal
    assert len({batch.cu_seqlens for batch in batches}) == (1 if equal else 3)


def test_every_layer_of_the_profiled_student_has_a_full_attention_head():
    student = models.hybrid_at_ratio(models.SMOLLM2_135M)
    counts = [len(student.fa_heads(layer)) for layer in range(student.num_layers)]
    assert sum(counts) == 9 * 30 // 8
    assert set(counts) == {1, 2}


def test_differences_are_found_and_named_by_kind():
    first = {"decoder.layers.0.x": torch.ones(2), "decoder.layers.1.x": torch.ones(2)}
    other = first | {"decoder.layers.1.x": torch.tensor([1.0, 1.5])}
    text, worst, number = repeatability.compared(first, other)
    assert (worst, number) == (0.5, 1)
    assert text == "x 5.0e-01 (1 of 2)"
    assert repeatability.compared(first, first) == ("nothing", 0.0, 0)
    assert repeatability.difference(torch.ones(1), torch.tensor([float("nan")])) == float("inf")


@pytest.mark.parametrize("module", [step_profile, repeatability])
def test_help_shows_an_example(module, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    assert f"python -m {module.__name__}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_profile_at_a_toy_size(tmp_path, capsys):
    flags = ["--repeats", "1", "--warmup", "1", "--steps", "1", "--output", str(tmp_path)]
    assert step_profile.main([*TOY, *flags]) == 0
    assert "host time by operation" in (tmp_path / "step_profile_align.txt").read_text()
    assert json.loads((tmp_path / "step_profile.json").read_text())["rows"]


@pytest.mark.slow
def test_equal_runs_on_this_cpu_are_equal(tmp_path, capsys):
    assert (
        repeatability.main([*TOY, "--repeats", "2", "--steps", "1", "--output", str(tmp_path)]) == 0
    )
    notes = json.loads((tmp_path / "repeatability.json").read_text())["notes"]
    assert [note for note in notes if "again" in note]
    assert all("0 of" in note for note in notes if "again" in note)
    assert not [note for note in notes if "Error" in note or "refused" in note]
