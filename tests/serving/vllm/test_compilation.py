"""torch.compile, as ``vllm serve`` runs it by default on a GPU: each piece once, and not again at a next start.

On a CPU vLLM compiles the model as one graph, so here it is told to do as on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from tests.serving.vllm import engines

engines.need_vllm()

FP32 = 5e-5
PIECES = 3
"""What lies before the first attention, between two, and after the last; attention is not compiled."""


@pytest.fixture
def options(monkeypatch, tmp_path):
    """Options of an engine that compiles as on a GPU, with an empty cache."""
    from vllm import envs

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    envs.disable_envs_cache()  # another engine of this process has read the old one
    yield {"enforce_eager": False} | (
        {} if torch.cuda.is_available() else _as_on_a_gpu(monkeypatch)
    )
    envs.disable_envs_cache()


def _as_on_a_gpu(monkeypatch):
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def keep_mode(cls, vllm_config):
        update(cls, vllm_config)
        found = vllm_config.compilation_config
        found.mode, found.backend = CompilationMode.VLLM_COMPILE, "inductor"
        found.compile_sizes = []

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep_mode))
    # It and the fusions name kernels that vLLM's build for CPUs does not have.
    monkeypatch.setattr(FixFunctionalizationPass, "__call__", lambda self, graph: None)
    fusions = {"fuse_norm_quant": False, "fuse_act_quant": False}
    return {"compilation_config": {"pass_config": fusions}}


def test_layers_of_all_shapes_are_compiled_once(options, tmp_path):
    """A second start compiles nothing, and both answer as the export."""
    from vllm.compilation.counter import compilation_counter

    folder = tmp_path / "export"
    model = engines.save_export(folder)
    prompts = engines.random_prompts((1, 3, 37, 300))
    for saved, compiled, loaded in ((PIECES, 1, 0), (0, 0, 1)):
        with (
            compilation_counter.expect(
                num_compiled_artifacts_saved=saved,
                num_aot_compiles=compiled,
                num_aot_artifacts_loaded=loaded,
            ),
            engines.engine(folder, **options) as llm,
        ):
            for prompt, answer in zip(prompts, engines.generate(llm, prompts), strict=True):
                engines.check(model, prompt, answer, FP32)
