"""How FLA's kernels are prepared: choices also serve other numbers of heads; compilations run in parallel.

The libraries themselves check both: Triton compiles for an H100 without one; FLA reads the written choices.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hydra.ops import fla_tuning, kernel_cache
from megatron_hydra.ops.kernels import Case

pytest.importorskip("triton")

_TUNED = '''
import json, sys, threading
import torch, triton, triton.compiler, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from megatron_hydra.ops.fla_tuning import configurations_compiled_together


class Driver:
    """An H100 that launches nothing and finds every configuration equally fast."""

    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_benchmarker = lambda self: lambda call, quantiles: (call(), [1.0] * 3)[1]


driver.set_active(Driver())
launch = JITFunction.run
JITFunction.run = lambda self, *a, grid, warmup, **k: launch(self, *a, grid=grid, warmup=True, **k)
compiled = []
one = triton.compiler.compile


def recorded(*args, **kwargs):
    compiled.append(threading.current_thread().name)
    return one(*args, **kwargs)


triton.compiler.compile = recorded


@triton.autotune([triton.Config({}, num_warps=w) for w in (1, 2, 4)], key=["H"])
@triton.heuristics({"EVEN": lambda args: args["N"] % 2 == 0})
@triton.jit(do_not_specialize=["N"])
def kernel(x, N, H: tl.constexpr, EVEN: tl.constexpr):
    at = tl.program_id(0) * H + tl.arange(0, H)
    tl.store(x + at, tl.load(x + at, mask=at < N) + 1, mask=at < N)


x, told = torch.zeros(64), []
with configurations_compiled_together(3, told.append):
    kernel[(1,)](x, 64, H=16)
    kernel[(1,)](x, 64, H=16)
together = list(compiled)
kernel[(1,)](x, 64, H=32)
print(json.dumps({"together": together, "after": compiled[len(together):], "told": told}))
'''


@pytest.mark.slow
def test_configurations_are_compiled_side_by_side_before_they_are_timed(tmp_path: Path) -> None:
    """Threads compile each once; timing compiles nothing more. Without the block, they compile one by one."""
    script = tmp_path / "tuned.py"
    script.write_text(_TUNED)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["together"]) == 3
    assert all(name.startswith("compile") for name in found["together"])
    assert found["after"] == ["MainThread"] * 3
    assert found["told"] == ["kernel"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of choices; FLA's two variables are unset before and after."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ("FLA_CACHE_MODE", "FLA_CONFIG_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return fla_tuning.choices_folder(Case(torch.device("cpu"), torch.bfloat16, 128))


@pytest.mark.slow
def test_a_choice_serves_other_numbers_of_heads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLA's own code takes the choice, but not if arguments differ in kind."""
    pytest.importorskip("fla")
    fla_tuning.use_choices(Case(torch.device("cpu"), torch.bfloat16, 128))
    fla_tuning.import_fla()
    import triton
    from fla.ops.common.chunk_o import chunk_fwd_kernel_o
    from fla.ops.utils import cache

    monkeypatch.setattr(cache, "FLA_CACHE_MODE", cache.FlaCacheMode.FUZZY)
    kernel = chunk_fwd_kernel_o.fn
    assert isinstance(kernel, cache.CachedAutotuner)
    chosen = triton.Config({"BK": 64, "BV": 128}, num_warps=4, num_stages=3)
    key = (16, 16, 128, 128, 64, False, "torch.bfloat16", "torch.float32")
    monkeypatch.setattr(kernel, "cache", {key: chosen})
    assert fla_tuning.write_choices() == 1
    assert fla_tuning.write_choices() == 0  # already known
    found = cache.load_cached_config(kernel.kernel_name, cache.AutotuneKey((9, 9, *key[2:])))
    assert found is not None
    assert found["kwargs"] == {"BK": 64, "BV": 128}
    assert (found["num_warps"], found["num_stages"]) == (4, 3)
    packed = cache.AutotuneKey((*key, "torch.int64"))
    assert cache.load_cached_config(kernel.kernel_name, packed) is None


def test_choices_are_kept_by_head_dimension_and_dtype(folder: Path) -> None:
    for other in (
        Case(torch.device("cpu"), torch.bfloat16, 64),
        Case(torch.device("cpu"), torch.float16, 128),
    ):
        fla_tuning.use_choices(other)
        assert os.environ["FLA_CACHE_MODE"] == "fuzzy"
        assert os.environ["FLA_CONFIG_DIR"] != str(folder)


@pytest.mark.parametrize(
    "mine", [{"FLA_CACHE_MODE": "strict"}, {"FLA_CONFIG_DIR": "/x", "FLA_CACHE_MODE": "full"}]
)
def test_what_the_user_has_set_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mine: dict[str, str]
) -> None:
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    fla_tuning.use_choices(Case(torch.device("cpu"), torch.bfloat16, 128))
    found = {name: os.environ.get(name) for name in ("FLA_CACHE_MODE", "FLA_CONFIG_DIR")}
    assert {name: value for name, value in found.items() if value} == mine
    assert fla_tuning.write_choices() == 0


@pytest.mark.parametrize("context_parallel", [False, True])
@pytest.mark.parametrize("flas_own", [False, True])
def test_flash_qla_is_left_out_where_fla_passes_the_states_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch, context_parallel: bool, flas_own: bool
) -> None:
    monkeypatch.setenv("FLA_FLASH_QLA", "")  # so that monkeypatch unsets it afterwards
    monkeypatch.delenv("FLA_FLASH_QLA")
    monkeypatch.setattr(kernel_cache, "_given", {})
    case = Case(torch.device("cpu"), torch.bfloat16, 128, context_parallel=context_parallel)
    fla_tuning.use_choices(case, flas_own)
    left_out = context_parallel and flas_own
    assert ("FLA_FLASH_QLA" in os.environ) is left_out
    assert ("FLA_FLASH_QLA" in kernel_cache.environment_as_given()) is left_out
    monkeypatch.setenv("FLA_FLASH_QLA", "1")  # the user's value stays
    fla_tuning.use_choices(case, flas_own)
    assert os.environ["FLA_FLASH_QLA"] == "1"


def test_layers_and_models_of_fla_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """FLA's layers import transformers, which takes seconds. They are not imported, but can be later."""
    for package in ("fla", "fla/ops", "fla/ops/gated_delta_rule", "fla/layers"):
        (tmp_path / package).mkdir(exist_ok=True, parents=True)
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "fla/__init__.py").write_text(
        "try:\n    import fla.layers\n    has_layers = True\nexcept ModuleNotFoundError:\n"
        "    has_layers = False\n"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    fla_tuning.import_fla()
    assert sys.modules["fla"].has_layers is False
    import fla.layers

    assert fla.layers.__file__.startswith(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        del sys.modules[name]  # otherwise monkeypatch would restore these in place of the real ones


@pytest.fixture
def flash_qla(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A machine with FlashQLA, and layers of 7 and of 8 GDN heads."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TILELANG_CACHE_DIR"):
        monkeypatch.setenv(name, str(folder.parents[1]))
    monkeypatch.setenv("FLA_FLASH_QLA", "")
    monkeypatch.delenv("FLA_FLASH_QLA")
    monkeypatch.setattr(fla_tuning, "_FLASH_QLA_PACKAGE", "json")  # a module that every machine has
    monkeypatch.setattr(fla_tuning, "_refused", set())
    return Case(torch.device("cpu"), torch.bfloat16, 128, gdn_heads=(7, 8))


def test_what_flash_qla_refused_is_known_to_the_next_process(
    flash_qla: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fla_tuning.use_choices(flash_qla)
    assert not any(map(fla_tuning.flash_qla_refuses, (7, 8)))
    fla_tuning.refuse_flash_qla(flash_qla, 7, "no available layout found")
    assert "7 heads here (no available layout found): FLA's own kernels" in caplog.text
    assert [fla_tuning.flash_qla_refuses(heads) for heads in (7, 8)] == [True, False]
    monkeypatch.setattr(fla_tuning, "_refused", set())
    fla_tuning.use_choices(flash_qla)
    assert [fla_tuning.flash_qla_refuses(heads) for heads in (7, 8)] == [True, False]
    monkeypatch.setattr(fla_tuning, "_refused", set())
    monkeypatch.setenv("FLA_FLASH_QLA", "1")  # the user requires FlashQLA
    fla_tuning.use_choices(flash_qla)
    assert not fla_tuning.flash_qla_refuses(7)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True), ({"head_dim": 64}, False), ({"dtype": torch.float32}, False),
        ({"context_parallel": True}, True),
    ],
)  # fmt: skip
def test_where_a_failure_may_be_flash_qlas(
    flash_qla: Case, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], expected: bool
) -> None:
    case = dataclasses.replace(flash_qla, **change)
    assert fla_tuning.is_flash_qla(case, 7) is expected
    monkeypatch.setattr(fla_tuning, "_FLASH_QLA_PACKAGE", "no_such_package")
    assert not fla_tuning.is_flash_qla(case, 7)
