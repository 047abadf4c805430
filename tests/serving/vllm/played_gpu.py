"""Triton compiles for a GPU that is not there.

``python -m tests.serving.vllm.played_gpu tuners|layers|launches|seconds`` does so with vLLM's kernels, for
compute capability 9.0. They are not run: their tensors lie on the CPU. ``seconds`` tells how long it takes,
``launches`` what a layer's attention launches.
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
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

INPUTS = ("_causal_conv1d_fwd_kernel", "triton_qk_preparation", "triton_delta_rule_gates")
"""What a prompt's delta rule needs first. Our own kernels have the names of their modules here."""
PROMPT = (
    "_gather_initial_states_kernel", "chunk_local_cumsum_scalar_kernel", "chunk_scaled_dot_kkt_fwd_kernel",
    "merge_16x16_to_64x64_inverse_kernel", "recompute_w_u_fwd_kernel",
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "chunk_fwd_kernel_o", "_scatter_states_kernel",
)  # fmt: skip
"""The delta rule of a prompt, in order."""

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
    torch.Tensor.is_cuda = True  # so that the layers choose their kernels
    utils = types.ModuleType("vllm.triton_utils")
    utils.triton, utils.tl, utils.HAS_TRITON, utils.tldevice = triton, tl, True, None
    utils.LOG2E = utils.LOGE2 = None
    sys.modules["vllm.triton_utils"] = utils
    type(current_platform).is_cpu = lambda self: False  # its convolutions would replace Triton's
    import vllm.model_executor.layers.mamba.ops.causal_conv1d
    import vllm.model_executor.layers.mamba.ops.gather_initial_states
    import vllm.model_executor.layers.mamba.ops.scatter_states
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


class PlayedProjection(torch.nn.Module):
    """As vLLM's linear layer."""

    def __init__(self, size: int, rows: int, **kwargs: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(rows, size))
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


class PlayedAttention(torch.nn.Module):
    """As vLLM's attention, which computes nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(q)


def make_attention(heads: int, kv_heads: int, head_dim: int, fa: list[list[int]]) -> list[Any]:
    """Attention layers of a model in bf16, whose states are all threes."""
    from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
    from megatron_hydra.serving.vllm import attention
    from megatron_hydra.serving.vllm.placement import place_heads

    config = HydraHeadConfig(
        num_hidden_layers=len(fa),
        hidden_size=64,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        full_attention_heads=fa,
    )
    vllm_config: Any = types.SimpleNamespace(
        parallel_config=types.SimpleNamespace(tensor_parallel_size=1),
        compilation_config=types.SimpleNamespace(static_forward_context={}),
        model_config=types.SimpleNamespace(dtype=torch.bfloat16),
        kernel_config=types.SimpleNamespace(linear_backend="auto"),
        cache_config=None,
    )
    placement = place_heads(fa, heads, kv_heads, 1)
    made = []
    with mock.patch.multiple(
        attention,
        Attention=PlayedAttention,
        ReplicatedLinear=PlayedProjection,
        get_tensor_model_parallel_rank=lambda: 0,
        get_tensor_model_parallel_world_size=lambda: 1,
        current_platform=types.SimpleNamespace(is_cuda=lambda: True),
    ):
        for index in range(len(fa)):
            layer = attention.HydraHeadAttention(
                config, placement, vllm_config, f"layers.{index}.attention"
            )
            layer.to(torch.bfloat16)
            assert layer.gdn is not None
            for parameter in (layer.gdn.A_log, layer.gdn.dt_bias, layer.gamma):
                assert parameter is not None
                parameter.data = parameter.data.float()
            conv, state = layer.gdn.shapes
            layer.gdn.kv_cache = (
                torch.full((5, *conv), 3.0, dtype=torch.bfloat16),
                torch.full((5, *state), 3.0),
            )
            made.append(layer)
    return made


def make_step(decodes: int, prompts: tuple[int, ...], apart: int = 1) -> Any:
    """vLLM's metadata of a step: requests with one token, then prompts of these lengths."""
    from vllm.third_party.flash_linear_attention.ops import index
    from vllm.third_party.flash_linear_attention.ops.utils import FLA_CHUNK_SIZE
    from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata
    from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

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
        chunks = (found.prefill_query_start_loc, FLA_CHUNK_SIZE)
        found.chunk_indices = index.prepare_chunk_indices(*chunks)
        found.chunk_offsets = index.prepare_chunk_offsets(*chunks)
        found.nums_dict, found.batch_ptr, found.token_chunk_offset_ptr = (
            compute_causal_conv1d_metadata(bounds, device=torch.device("cpu"))
        )
    return found


def seconds() -> None:
    """Of all configurations for one number of heads, and of one configuration for another."""
    from megatron_hydra.serving.vllm import kernel_start

    threads = len(os.sched_getaffinity(0))
    layers = [layer.gdn for layer in make_attention(16, 8, 128, [[0, 1], [0, 1, 2]])]
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


def name_of(kernel: Any) -> str:
    """A Triton kernel's name; our own have that of their module."""
    module = kernel.fn.__module__.rsplit(".", 1)[-1]
    return module if module.startswith("triton_") else str(kernel.fn.__name__)


class Launches(TorchDispatchMode):
    """Notes torch's operators that launch something on a GPU: neither views nor allocations."""

    NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        aliases = [value.alias_info for value in func._schema.returns]
        view = bool(aliases) and all(a is not None and not a.is_write for a in aliases)
        if not view and name not in self.NOTHING:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches() -> None:
    """What the attention of a layer of Qwen3-1.7B's shape launches, with FA heads in two KV groups."""
    from triton.runtime.jit import JITFunction

    from megatron_hydra.serving.vllm import kernel_start
    from megatron_hydra.serving.vllm.gated_delta_net import GatedDeltaNet, _Batch

    (layer,) = make_attention(16, 8, 128, [[2, 9]])
    counted = Launches()
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: counted.names.append(
        name_of(self)
    )
    PlayedAttention.forward = lambda self, q, k, v: (  # type: ignore[method-assign]
        counted.names.extend(["cache update", "attention"]) or torch.empty_like(q)
    )
    prepared, tail = (f"triton_{x}" for x in ("qk_preparation", "fusion_tail"))
    before = ["mm", prepared, *["cache update", "attention"] * 2]
    after = [tail, tail, "mm"]
    rule = list(PROMPT)
    rule.insert(rule.index("merge_16x16_to_64x64_inverse_kernel"), "zeros_like")
    with no_gpu():
        kernel_start.set_tuning(kernel_start.delta_rule_tuners(), "off")
        for step, between in (
            (make_step(0, (70,)), [*INPUTS, "clone", *rule]),
            (
                make_step(2, ()),
                [
                    "_causal_conv1d_update_kernel",
                    *INPUTS[1:],
                    "clone",
                    "fused_recurrent_gated_delta_rule_fwd_kernel",
                ],
            ),
        ):
            batch = _Batch.of(step)
            GatedDeltaNet.forward = lambda self, projected, tables, batch=batch: self._compute(
                projected, tables, self._states(), batch
            )
            tokens = batch.tokens
            x = torch.zeros(tokens, 64, dtype=torch.bfloat16)
            tables = (torch.zeros(tokens, 1, 128), torch.zeros(tokens, 1, 128))
            log_scale, y = torch.zeros(tokens), torch.empty_like(x)
            counted.names.clear()
            with counted, torch.no_grad():
                layer.run(x, tables, log_scale, y)
            print(f"{batch.kind}: {len(counted.names)} launches: {', '.join(counted.names)}")
            assert counted.names == [*before, *between, *after]
    print("as expected")


def layers() -> None:
    """The kernels of two layers with different numbers of heads, for a step of each kind."""
    from triton.runtime.jit import JITFunction

    from megatron_hydra.serving.vllm.gated_delta_net import _Batch
    from megatron_hydra.serving.vllm.kernel_start import KernelStart

    made = [layer.gdn for layer in make_attention(4, 2, 64, [[], [1]])]
    launched: list[str] = []
    steps: set[int] = set()  # between the pages that the kernels were given

    def kwargs_of(kernel: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in kwargs.items() if name in kernel.arg_names}

    launch = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert warmup, f"{self.fn.__name__} would run"
        launched.append(name_of(self))
        for index in (
            "stride_cache_indices", "stride_state_indices", "stride_indices_seq", "stride_indices",
        ):  # fmt: skip
            if index in self.arg_names:
                bound = inspect.signature(self.fn).bind(*args, **kwargs_of(self, kwargs))
                steps.add(bound.arguments[index])
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = note
    said: list[str] = []
    start = KernelStart(made, "off", 128, said.append)
    prompt, recurrent = {*INPUTS, *PROMPT}, "fused_recurrent_gated_delta_rule_fwd_kernel"
    token = {"_causal_conv1d_update_kernel", *INPUTS[1:], recurrent}
    with no_gpu():
        for kind, step, kernels in (
            ("prompts", make_step(0, (3, 70)), prompt),
            ("tokens", make_step(2, ()), token),
            ("tokens and prompts", make_step(1, (70,)), {*prompt, recurrent}),
            ("tokens, pages 7 apart", make_step(2, (), 7), token),
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
    kinds = {"tuners": tuners, "layers": layers, "launches": launches, "seconds": seconds}
    kinds[sys.argv[1]]()
