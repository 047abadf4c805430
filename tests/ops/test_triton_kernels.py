"""Each of our Triton kernels equals its torch twin: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import json

import pytest
import torch

from tests.kernel_processes import needs_triton, output_lines
from tests.ops import kernel_cases


@needs_triton
@pytest.mark.timeout(600)
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernels_equal_their_twins_in_the_interpreter(slow):
    printed = output_lines(
        "tests.ops.kernel_cases",
        *(["--slow"] if slow else []),
        interpreted=True,
        timeout=500 if slow else 240,
    )
    ran = [check for check in kernel_cases.CHECKS if (check in kernel_cases.SLOW) == slow]
    assert printed == [check.__name__ for check in ran]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", kernel_cases.CHECKS)
def test_kernels_equal_their_twins_on_the_gpu(check, dtype):
    torch.manual_seed(0)
    check(torch.device("cuda"), dtype)


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_here():
    built = [
        json.loads(line)
        for line in output_lines("tests.ops.compiled", interpreted=False, timeout=280)
    ]
    kernels = {tuple(b["kernel"].split(".")[-2:]) for b in built}
    assert kernels == {
        (f"triton_{module}", f"_{kernel}_kernel")
        for module, kernels_of_it in {
            "chunk_loss": ("statistics", "gradient"),
            "delta_rule_gates": ("forward", "backward"),
            "fusion_tail": ("forward", "backward"),
            "qk_preparation": ("forward", "backward"),
            "short_conv": ("forward", "backward"),
            "squared_error": ("squared_error",),
        }.items()
        for kernel in kernels_of_it
    }
    # Sizes of real models: whole blocks of a vocabulary, d = 128, and a single head.
    assert {b["BLOCK"] for b in built if "chunk_loss" in b["kernel"]} >= {16, 4096}
    for module in ("fusion_tail", "qk_preparation"):
        sizes = {(b["D"], b["heads"]) for b in built if module in b["kernel"]}
        assert (128, 1) in sizes
        assert any(d < 128 and heads > 1 for d, heads in sizes)


@pytest.mark.parametrize("module", ["fusion_tail", "triton_fusion_tail"])
def test_a_tail_without_steps_copies_nothing(module):
    """As in the dense model of the benchmarks: no gate, norm, scale or second branch."""
    if module.startswith("triton"):
        pytest.importorskip("triton")
    tail = importlib.import_module(f"megatron_hydra.ops.{module}").fusion_tail
    o = torch.randn(5, 3, 8)
    joined = tail([(o, None)], None, None)
    assert joined.shape == (5, 24)
    assert joined.data_ptr() == o.data_ptr()
