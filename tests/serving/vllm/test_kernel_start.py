"""The choice of configurations is shared between numbers of heads; kernels are compiled ahead, and not run.

Triton's own tuner and compiler, without a GPU: timing and launching are played, or the target is named.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.runtime.autotuner import Autotuner  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from megatron_hydra.errors import HydraError  # noqa: E402
from megatron_hydra.serving.vllm import kernel_start  # noqa: E402
from megatron_hydra.serving.vllm.kernel_start import KernelStart, compiling, set_tuning  # noqa: E402
from tests.serving.vllm.played_gpu import no_gpu  # noqa: E402

WARPS = (1, 2, 4)


class Timed:
    """A kernel whose every launch is noted; two warps are the fastest."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, int]] = []
        self.timed: list[int] = []

        def kernel(x, T, H, K):
            """Triton asks for a function's name."""

        self.base = kernel
        self.tuner = Autotuner(
            self,
            ["x", "T", "H", "K"],
            [triton.Config({}, num_warps=warps) for warps in WARPS],
            ["H", "K"],
            None,
            None,
            do_bench=self.bench,
        )
        self.tuner.cache_results = False  # whatever the environment says

    @property
    def fn(self) -> Any:
        return self.base

    def run(self, *args: Any, num_warps: int, H: int, **kwargs: Any) -> None:
        self.launched.append((H, num_warps))

    def bench(self, call: Any, quantiles: Any) -> list[float]:
        call()
        heads, warps = self.launched.pop()
        self.timed.append(heads)
        return [float(abs(warps - 2))] * 3

    def launch(self, heads: int, width: int = 64) -> tuple[int, int]:
        self.tuner.run(torch.zeros(1), T=5, H=heads, K=width)
        return self.launched[-1]


@pytest.mark.parametrize(
    ("tuning", "timed", "warps"),
    [
        ("once", [14] * 3 + [14] * 3, 2),
        ("full", [14] * 3 + [13] * 3 + [14] * 3, 2),
        ("off", [], 1),
    ],
)
def test_choices(tuning, timed, warps, monkeypatch):
    """Timed for the first number of heads only, and again for another width; or as Triton does; or never."""
    monkeypatch.setattr(Autotuner, "check_disk_cache", lambda self, key, configs, bench: bench())
    kernel = Timed()
    set_tuning([kernel.tuner], tuning)
    assert [kernel.launch(14), kernel.launch(13), kernel.launch(14), kernel.launch(14, 128)] == [
        (14, warps),
        (13, warps),
        (14, warps),
        (14, warps),
    ]
    assert kernel.timed == timed
    assert kernel.tuner.cache_results == (tuning == "once")  # Triton keeps them in its cache folder


def test_engines_of_one_process(monkeypatch):
    """The same tuning again keeps the choice; another begins anew, with every configuration."""
    monkeypatch.setattr(Autotuner, "check_disk_cache", lambda self, key, configs, bench: bench())
    kernel = Timed()
    for tuning, timed in (("once", 3), ("once", 3), ("off", 3), ("full", 6), ("once", 9)):
        set_tuning([kernel.tuner], tuning)
        kernel.launch(6)
        assert len(kernel.timed) == timed, tuning
    assert not Timed().tuner.cache_results


def test_option():
    assert kernel_start.read_tuning({}) == kernel_start.read_tuning(None) == "once"
    assert kernel_start.read_tuning({"gdn_prefill_backend": "triton"}) == "once"
    assert kernel_start.read_tuning({"hydrahead_tuning": "off"}) == "off"
    assert kernel_start.read_tuning({}, first_only=True) == "off"
    assert kernel_start.read_tuning({"hydrahead_tuning": "full"}, first_only=True) == "full"
    with pytest.raises(HydraError, match=r"--additional-config: hydrahead_tuning='never' .* once"):
        kernel_start.read_tuning({"hydrahead_tuning": "never"})


@triton.jit
def _scale(x, H: triton.language.constexpr, BLOCK: triton.language.constexpr):
    i = triton.language.arange(0, BLOCK)
    triton.language.store(x + i, triton.language.load(x + i) * H)


@pytest.mark.skipif(
    not isinstance(_scale, JITFunction), reason="Triton's interpreter compiles nothing"
)
def test_compiling(tmp_path, monkeypatch):
    """Every configuration for the first number of heads, the chosen one for the next; nothing runs."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tuner = Autotuner(
        _scale,
        _scale.arg_names,
        [triton.Config({"BLOCK": block}) for block in (16, 32, 64)],
        ["H"],
        None,
        None,
        do_bench=lambda call, quantiles: pytest.fail("timed"),
    )
    set_tuning([tuner], "once")
    x = torch.ones(64)
    with no_gpu():
        kept, _, _, _, _ = _scale.device_caches[0]
        with compiling([tuner], threads=2):
            tuner.run(x, H=3, grid=(1,), warmup=False)
        assert len(kept) == len(tuner.configs) and not tuner.cache
        tuner.cache[3, "torch.float32"] = tuner.configs[1]
        with compiling([tuner], threads=2):
            tuner.run(x, H=5, grid=(1,), warmup=False)
        assert len(kept) == len(tuner.configs) + 1
        assert list(tuner.cache.values()) == [tuner.configs[1]]
        assert all(hasattr(kernel, "asm") for kernel in kept.values())
    assert x.eq(1).all()
    assert JITFunction.run is not None and JITFunction.run.__qualname__ == "JITFunction.run"
    assert tuner.cache_results


class Layer:
    """Notes what is asked of it."""

    def __init__(self, heads: int, kernel: Timed, notes: list[Any]) -> None:
        self.prefix, self.local_heads = f"layer of {heads}", heads
        self.kernel, self.notes = kernel, notes

    def kernel_shape(self) -> tuple[int]:
        return (self.local_heads,)

    def launch_prompt(self, tokens: int) -> None:
        self.notes.append(("prompt", self.local_heads, tokens))
        self.kernel.launch(self.local_heads)

    def launch_step(self, metadata: Any) -> None:
        self.notes.append(("step", self.local_heads, metadata))


def _start(tuning: str, monkeypatch) -> tuple[KernelStart, Timed, list[Any], list[str]]:
    monkeypatch.setattr(Autotuner, "check_disk_cache", lambda self, key, configs, bench: bench())
    kernel, notes, said = Timed(), [], []
    layers = [Layer(heads, kernel, notes) for heads in (6, 5, 5, 6, 6, 2)]
    return KernelStart(layers, tuning, 512, said.append, 2, [kernel.tuner]), kernel, notes, said


def test_start(monkeypatch):
    """Tuned once, for the commonest number of heads; every shape of layer once for a kind of step."""
    start, kernel, notes, said = _start("once", monkeypatch)
    start.tune()
    start.tune()
    assert notes == [("prompt", 6, 512)] * 2  # compiled, then timed
    assert kernel.timed == [6] * len(WARPS)
    for kind in ("prompts", "tokens", "prompts"):
        start.step(kind, lambda layer: layer.prefix)
    assert sorted(notes[2:]) == sorted([("step", n, f"layer of {n}") for n in (6, 5, 2)] * 2)
    assert "3 configurations" in said[0] and "6 heads" in said[0] and len(said) == 3


@pytest.mark.parametrize(("tuning", "steps"), [("full", 0), ("off", 3)])
def test_start_without_timing(tuning, steps, monkeypatch):
    start, kernel, notes, _ = _start(tuning, monkeypatch)
    start.step("prompts", lambda layer: None)
    assert len(notes) == steps and not kernel.timed


@pytest.fixture
def package(monkeypatch) -> types.SimpleNamespace:
    """Modules as vLLM's, each with a tuned kernel behind another decorator."""
    modules = {}
    for module, name in kernel_start.KERNELS.items():
        made = types.ModuleType(f"played_fla.{module}")
        setattr(made, name, types.SimpleNamespace(fn=Timed().tuner))
        monkeypatch.setitem(sys.modules, f"played_fla.{module}", made)
        modules[module] = made
    monkeypatch.setitem(sys.modules, "played_fla", types.ModuleType("played_fla"))
    return types.SimpleNamespace(**modules)


def test_kernels_are_found(package):
    found = kernel_start.delta_rule_tuners("played_fla")
    assert len(found) == len(kernel_start.KERNELS) and all(isinstance(t, Autotuner) for t in found)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: delattr(p.chunk_o, "chunk_fwd_kernel_o"), r"no played_fla\.chunk_o\.chunk_fwd"),
        (
            lambda p: setattr(p.chunk_o, "chunk_fwd_kernel_o", print),
            r"chunk_fwd_kernel_o is not tuned",
        ),
        (
            lambda p: setattr(p.wy_fast.recompute_w_u_fwd_kernel.fn, "keys", ["K"]),
            r"recompute_w_u_fwd_kernel is not tuned by H",
        ),
    ],
)
def test_other_kernels_are_refused(package, change, named):
    change(package)
    with pytest.raises(HydraError, match=named) as raised:
        kernel_start.delta_rule_tuners("played_fla")
    assert '{"hydrahead_tuning": "full"}' in str(raised.value)


@pytest.mark.parametrize("kind", ["tuners", "layers", "launches"])
def test_the_kernels_of_vllm(kind, tmp_path):
    """In a process of its own, in which vLLM's sources see Triton though there is no GPU."""
    from tests.serving.vllm import engines

    engines.need_vllm()
    with contextlib.suppress(AttributeError):
        if torch.cuda.is_available():
            pytest.skip("test_gpu.py runs them")
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.vllm.played_gpu", kind],
        cwd=Path(__file__).parents[3],
        env={**__import__("os").environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as expected" in done.stdout
