"""``deterministic: true`` configures every library and refuses kernels that cannot be deterministic."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn.attention import SDPBackend

from megatron_hydra.config.run import RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.model.layer_spec import transformer_config
from megatron_hydra.ops import determinism, gpu_attention
from megatron_hydra.ops.gated_delta_rule import _running_sum
from tests.training import tiny


@pytest.fixture(autouse=True)
def environment_is_given_back(monkeypatch):
    for name in determinism.ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)


def test_torch_and_the_libraries_are_asked():
    determinism.make_deterministic()
    assert determinism.is_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_ALGO"] == "^NVLS"
    assert os.environ["FLA_CACHE_MODE"] == "disabled"
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"


def test_an_environment_that_says_the_opposite_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "NVLS")
    with pytest.raises(HydraError, match=r"NCCL_ALGO=NVLS.*one of \^NVLS, Tree, Ring"):
        determinism.make_deterministic()
    assert not determinism.is_deterministic()


@pytest.mark.parametrize("asked", [False, True])
def test_megatron_is_told(asked):
    config = transformer_config(tiny.student_config(), RunConfig(deterministic=asked))
    assert config.deterministic_mode is asked


@pytest.mark.parametrize("asked", [False, True])
def test_attention_with_atomics_is_left_out(asked, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        gpu_attention, "sdpa_kernel", lambda kernels, **_: chosen.append(kernels) or torch.no_grad()
    )
    torch.use_deterministic_algorithms(asked)
    q = torch.zeros(8, 2, 16)
    gpu_attention.sdpa_attention(q, q, q, (0, 4, 8), (0, 4, 8))
    assert (SDPBackend.CUDNN_ATTENTION in chosen[0]) is not asked


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_running_sum_is_a_sum_in_every_mode(device):
    x = torch.randn(3, 2, 16, 1, device=device)
    causal = torch.ones(16, 16, dtype=torch.bool, device=device).tril()
    expected = x.cumsum(-2)
    torch.use_deterministic_algorithms(True)
    torch.testing.assert_close(_running_sum(x, causal), expected)


class TestPinnedAutotuning:
    """Triton's own autotuner with a fake kernel and a fake timer."""

    @pytest.fixture
    def tuned(self):
        autotuner = pytest.importorskip("triton.runtime.autotuner")
        from triton import Config
        from triton.runtime.errors import OutOfResources

        class Kernel:
            @staticmethod
            def fn(x, BLOCK):
                raise AssertionError("never called by itself")

            arg_names = ("x", "BLOCK")

            def __init__(self):
                self.ran, self.too_large = [], set()

            def run(self, x, BLOCK, **_):
                if BLOCK in self.too_large:
                    raise OutOfResources(2, 1, "shared memory")
                self.ran.append(BLOCK)

        def stopwatch(call, quantiles):
            call()
            return [1.0 / kernel.ran[-1]] * 3  # this time, large blocks are the fastest

        class Pinned(autotuner.Autotuner):
            pass

        kernel = Kernel()
        configs = [Config({"BLOCK": block}) for block in (16, 32, 64)]
        make = [kernel, kernel.arg_names, configs, ["x"], None, None]
        return kernel, Pinned, lambda kind: kind(*make, do_bench=stopwatch), autotuner.Autotuner

    def test_without_it_the_fastest_is_taken(self, tuned):
        kernel, _, make, plain = tuned
        make(plain).run(1)
        assert kernel.ran == [16, 32, 64, 64]

    def test_the_first_is_taken_and_no_other_tried(self, tuned):
        kernel, pinned, make, _ = tuned
        determinism.pin(pinned)
        determinism.pin(pinned)  # a second call changes nothing
        tuner = make(pinned)
        for key in (1, 1, 2):
            tuner.run(key)
        assert set(kernel.ran) == {16}

    def test_one_that_cannot_run_here_is_passed_over(self, tuned):
        kernel, pinned, make, _ = tuned
        determinism.pin(pinned)
        kernel.too_large = {16}
        make(pinned).run(1)
        assert kernel.ran == [32, 32]

    def test_choices_of_earlier_processes_are_not_read(self, tuned):
        _, pinned, make, _ = tuned
        determinism.pin(pinned)
        asked = []
        assert make(pinned).check_disk_cache("key", [], lambda: asked.append(1)) is False
        assert asked == [1]
