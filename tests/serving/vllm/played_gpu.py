"""Triton compiles for a GPU that is not there.

``python -m tests.serving.vllm.played_gpu tuners|layers|seconds`` does so with vLLM's kernels, for compute
capability 9.0. They are not run: their tensors lie on the CPU. ``seconds`` tells how long it takes.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import torch

SHARED_MEMORY = 232448
"""Bytes of a block of threads on Hopper."""


class PlayedDriver:
    """What Triton asks of a driver before it launches anything."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132}

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextlib.contextmanager
def no_gpu() -> Iterator[None]:
    """Triton's driver is :class:`PlayedDriver`."""
    from triton.runtime import driver

    before = driver._active  # `reset_active` asks for a GPU
    driver.set_active(PlayedDriver())
    try:
        yield
    finally:
        driver._active = before


def import_kernels() -> None:
    """Let vLLM's kernels be Triton's; before anything of vLLM is imported."""
    import triton
    import triton.language as tl
    import vllm
    from vllm.platforms import current_platform

    torch.cuda.get_device_name = lambda device=0: "NVIDIA H200"
    utils = types.ModuleType("vllm.triton_utils")
    utils.triton, utils.tl, utils.HAS_TRITON, utils.tldevice = triton, tl, True, None
    utils.LOG2E = utils.LOGE2 = None
    sys.modules["vllm.triton_utils"] = utils
    type(current_platform).is_cpu = lambda self: False  # its convolutions would replace Triton's
    import vllm.model_executor.layers.mamba.ops.causal_conv1d
    import vllm.third_party.flash_linear_attention.ops.chunk  # noqa: F401

    del type(current_platform).is_cpu


def tuners() -> None:
    """All six are there, and tuned by their number of heads."""
    from megatron_hydra.serving.vllm.kernel_start import KERNELS, delta_rule_tuners

    with no_gpu():
        found = delta_rule_tuners()
    number = sum(len(tuner.configs) for tuner in found)
    assert [t.base_fn.__name__ for t in found] == list(KERNELS.values())
    print(f"{number} configurations, as expected")


def make_layers(heads: int, kv_heads: int, head_dim: int, fa_heads: list[list[int]]) -> list[Any]:
    """GDN heads of a model in bf16, whose states are all threes."""
    from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
    from megatron_hydra.serving.vllm.gated_delta_net import GatedDeltaNet
    from megatron_hydra.serving.vllm.layout import AttentionLayout
    from megatron_hydra.serving.vllm.placement import place_heads

    config = HydraHeadConfig(
        num_hidden_layers=len(fa_heads),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        full_attention_heads=fa_heads,
    )
    vllm_config: Any = types.SimpleNamespace(
        parallel_config=types.SimpleNamespace(tensor_parallel_size=1),
        compilation_config=types.SimpleNamespace(static_forward_context={}),
        model_config=types.SimpleNamespace(dtype=torch.bfloat16),
    )
    made = []
    for index, ranks in enumerate(place_heads(fa_heads, heads, kv_heads, 1)):
        layout = AttentionLayout(config, index, ranks[0])
        layer = GatedDeltaNet(config, layout, vllm_config, f"layers.{index}.gdn")
        layer.to(torch.bfloat16)
        layer.A_log.data, layer.dt_bias.data = layer.A_log.float(), layer.dt_bias.float()
        layer._has_kernels = lambda x: True  # type: ignore[method-assign]
        conv, state = layer.shapes
        layer.kv_cache = (
            torch.full((5, *conv), 3.0, dtype=torch.bfloat16),
            torch.full((5, *state), 3.0),
        )
        made.append(layer)
    return made


def seconds() -> None:
    """Of all configurations for one number of heads, and of one configuration for another."""
    from megatron_hydra.serving.vllm import kernel_start

    threads = len(os.sched_getaffinity(0))
    layers = make_layers(16, 8, 128, [[0, 1], [0, 1, 2]])
    with no_gpu():
        found = kernel_start.delta_rule_tuners()
        for layer, tuning in zip(layers, ("once", "off"), strict=True):
            kernel_start.set_tuning(found, tuning)
            start = time.perf_counter()
            with kernel_start.compiling(found, threads):
                layer.launch_prompt(256)
            print(
                f"{layer.local_heads} heads: {sum(len(tuner.configs) for tuner in found)} configurations in "
                f"{time.perf_counter() - start:.0f} s by {threads} threads"
            )


def layers() -> None:
    """The kernels of two layers with different numbers of heads, for a step of each kind."""
    from triton.runtime.jit import JITFunction
    from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata
    from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

    from megatron_hydra.serving.vllm.gated_delta_net import _Batch
    from megatron_hydra.serving.vllm.kernel_start import KernelStart

    made = make_layers(4, 2, 64, [[], [1]])

    def metadata(decodes: int, prompts: tuple[int, ...], apart: int = 1) -> GDNAttentionMetadata:
        lengths = (*[1] * decodes, *prompts)
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        found = GDNAttentionMetadata(
            num_prefills=len(prompts),
            num_prefill_tokens=sum(prompts),
            num_decodes=decodes,
            num_decode_tokens=decodes,
            num_spec_decodes=0,
            num_spec_decode_tokens=0,
            num_actual_tokens=sum(lengths),
            non_spec_query_start_loc=bounds,
            non_spec_state_indices_tensor=torch.ones(len(lengths), apart, dtype=torch.int32)[:, 0],
        )
        if prompts:
            found.has_initial_state = torch.zeros(len(lengths), dtype=torch.bool)
            found.prefill_query_start_loc = bounds[decodes:] - decodes
            found.nums_dict, found.batch_ptr, found.token_chunk_offset_ptr = (
                compute_causal_conv1d_metadata(bounds, device=torch.device("cpu"))
            )
        return found

    launched: list[str] = []
    steps: set[int] = set()  # between the pages that the kernels were given

    def kwargs_of(kernel: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in kwargs.items() if name in kernel.arg_names}

    launch = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert warmup, f"{self.fn.__name__} would run"
        launched.append(self.fn.__name__)
        for index in ("stride_cache_indices", "stride_state_indices", "stride_indices_seq"):
            if index in self.arg_names:
                bound = inspect.signature(self.fn).bind(*args, **kwargs_of(self, kwargs))
                steps.add(bound.arguments[index])
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = note
    said: list[str] = []
    start = KernelStart(made, "off", 128, said.append)
    prompt = {
        "_causal_conv1d_fwd_kernel", "chunk_local_cumsum_scalar_kernel", "chunk_scaled_dot_kkt_fwd_kernel",
        "merge_16x16_to_64x64_inverse_kernel", "recompute_w_u_fwd_kernel",
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "chunk_fwd_kernel_o",
    }  # fmt: skip
    recurrent = "fused_recurrent_gated_delta_rule_fwd_kernel"
    with no_gpu():
        for kind, step, kernels in (
            ("prompts", metadata(0, (3, 70)), prompt),
            ("tokens", metadata(2, ()), {"_causal_conv1d_update_kernel", recurrent}),
            ("tokens and prompts", metadata(1, (70,)), {*prompt, recurrent}),
            (
                "tokens, pages 7 apart",
                metadata(2, (), 7),
                {"_causal_conv1d_update_kernel", recurrent},
            ),
        ):
            launched.clear()
            steps.clear()
            assert _Batch.of(step).kind == kind
            start.step(kind, lambda layer, step=step: step)
            assert set(launched) == kernels, (kind, launched)
            assert len(launched) == len(made) * len(kernels), (kind, launched)
            assert steps == {step.non_spec_state_indices_tensor.stride(0)}, (kind, steps)
    for layer in made:
        assert all(x.eq(3.0).all() for x in layer.kv_cache), "a state was written"
    print("\n".join(said), "as expected")


if __name__ == "__main__":
    with no_gpu():  # the sources ask for the GPU when they are imported
        import_kernels()
    {"tuners": tuners, "layers": layers, "seconds": seconds}[sys.argv[1]]()
