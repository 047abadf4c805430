"""A layer's fused kernels in Triton's interpreter, on a CPU. With ``TRITON_INTERPRET=1``:

- ``python -m tests.serving.vllm.interpreted engine FOLDER`` writes an export into FOLDER and compares vLLM's
  answers with it, in fp32. The delta rule and the convolution are torch's.
- ``python -m tests.serving.vllm.interpreted rule`` compares the path of 16 bits with torch's path. Torch plays
  those of vLLM's kernels that the interpreter cannot run. All that joins them is real.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_hydra.serving.vllm import kernels
from tests.serving.vllm import engines, played_gpu

HEADS = [[1, 2, 3], [], [0, 1, 2, 3, 4, 5]]
SWITCHES = {"fusion": "gated", "gdn_kv": "gqa", "fa_position": "both"}
OUTPUT, STATE = 1.6e-2, 1e-3
"""Largest relative differences of the two paths in bf16: they round at other places."""


def engine(folder: str) -> None:
    """An engine's answers."""
    engines.need_vllm()
    from megatron_hydra.serving.vllm import attention, gated_delta_net

    for module in (attention, gated_delta_net):
        module.layer_kernels = lambda x: kernels._fused()
    model = engines.save_export(Path(folder), HEADS, hydra=SWITCHES)
    prompts = engines.random_prompts((1, 3, 37))
    with engines.engine(Path(folder)) as llm:
        for prompt, answer in zip(prompts, engines.generate(llm, prompts, 4), strict=True):
            engines.check(model, prompt, answer, 5e-5)


def _gather(state: torch.Tensor, slots: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
    return state[slots.long()].masked_fill(~begun[:, None, None, None], 0.0)


def _chunks(*, initial_state: torch.Tensor, cu_seqlens: torch.Tensor, **inputs: Any) -> Any:
    from megatron_hydra.ops.gated_delta_rule import chunked_gated_delta_rule

    q, k, v, g, beta = (inputs[name][0].float() for name in ("q", "k", "v", "g", "beta"))
    before, bounds = initial_state.transpose(-1, -2).float(), tuple(cu_seqlens.tolist())
    o, after = chunked_gated_delta_rule(q, k, v, g, beta, bounds, before)
    return o[None].to(inputs["q"].dtype), after.transpose(-1, -2).contiguous()


def _tokens(*, initial_state: torch.Tensor, ssm_state_indices: torch.Tensor, **inputs: Any) -> Any:
    from megatron_hydra.hf.modeling_hydrahead import recurrent_gated_delta_rule

    slots = ssm_state_indices.long()
    steps = (inputs[name][0][:, None] for name in ("q", "k", "v", "g", "beta"))
    before = initial_state[slots].transpose(-1, -2).float()
    o, after = recurrent_gated_delta_rule(*steps, state=before)
    initial_state[slots] = after.transpose(-1, -2)
    return o.transpose(0, 1).to(inputs["q"].dtype), initial_state


@torch.no_grad()
def rule() -> None:
    """GDN heads of two layers, for every kind of step, with states and without, and with rows to spare."""
    with played_gpu.no_gpu():
        played_gpu.import_kernels()
    from vllm.model_executor.layers.mamba.ops import gather_initial_states
    from vllm.third_party.flash_linear_attention import ops

    from megatron_hydra.serving.vllm.gated_delta_net import _Batch

    gather_initial_states.gather_initial_states = _gather
    ops.chunk_gated_delta_rule, ops.fused_recurrent_gated_delta_rule = _chunks, _tokens
    torch.manual_seed(0)
    for attention in played_gpu.make_attention(4, 2, 64, [[], [1]]):
        layer = attention.gdn
        layer._fast_convolution = layer._convolution
        for parameter in layer.parameters():
            parameter.data = (0.5 + torch.rand(parameter.shape) / 2).to(parameter.dtype)
        for decodes, prompts, spare in ((0, (3, 70), 0), (2, (), 3), (1, (70,), 0)):
            step = played_gpu.make_step(decodes, prompts)
            number = decodes + len(prompts)
            step.non_spec_state_indices_tensor = torch.arange(1, number + 1, dtype=torch.int32)
            if prompts:
                step.has_initial_state = torch.arange(number) < 1
            batch = _Batch.of(step)
            x = torch.randn(batch.tokens + spare, layer.layout.rows).bfloat16()
            angles = 3 * torch.rand(len(x), 1, 32).repeat(1, 1, 2)
            states = [torch.randn_like(x) for x in layer._states()]
            found = []
            for fast in (False, True):
                own = [x.clone() for x in states]
                with (
                    mock.patch.object(torch.Tensor, "is_cuda", fast),
                    mock.patch.object(layer, "_has_kernels", lambda x, fast=fast: fast),
                ):
                    out = layer._compute(x, (angles.cos(), angles.sin()), tuple(own), batch)
                found.append((out, *own))
            for a, b, bound in zip(*found, (OUTPUT, 0.0, STATE), strict=True):
                assert a.shape == b.shape
                apart = float((a.float() - b.float()).norm() / a.float().norm())
                assert apart <= bound, (batch.kind, apart)
            assert not any(out[batch.tokens :].any() for out, *_ in found)


if __name__ == "__main__":
    {"engine": engine, "rule": rule}[sys.argv[1]](*sys.argv[2:])
    print("as expected")
