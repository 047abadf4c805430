"""Model shapes of the benchmarks, and weights without a checkpoint."""

from __future__ import annotations

import dataclasses
import tempfile

import torch

from megatron_hydra.parallel import platform  # isort: skip  (before anything of Megatron-Core)

from benchmarks import _harness as harness
from megatron_hydra.checkpoint.canonical import canonical_shapes, is_fp32
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.config.run import (
    BackendConfig,
    BatchConfig,
    DataConfig,
    LossConfig,
    RecomputeConfig,
    RunConfig,
)
from megatron_hydra.ops.backends import choose_kernels
from megatron_hydra.ops.kernels import Case
from megatron_hydra.stopping import StopRequest
from megatron_hydra.training.warm_up import compile_once_per_node, warning_of
from megatron_hydra.transfer.verbs import VERBS

QWEN3_1_7B = ModelConfig(
    family="qwen3",
    num_layers=28,
    hidden_size=2048,
    ffn_hidden_size=6144,
    vocab_size=151936,
    num_query_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    max_position_embeddings=40960,
    tie_embeddings=True,
    qk_norm=True,
)
"""Qwen3-1.7B's shape."""

SMOLLM2_135M = ModelConfig(
    family="llama",
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    vocab_size=49152,
    num_query_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    max_position_embeddings=8192,
    tie_embeddings=True,
    qk_norm=False,
)
"""SmolLM2-135M's shape."""

TINY = dataclasses.replace(
    QWEN3_1_7B, num_layers=2, hidden_size=64, ffn_hidden_size=128, vocab_size=512,
    num_query_heads=8, num_kv_heads=4, head_dim=16,
)  # fmt: skip
"""A shape for trying a script on a CPU (``--tiny``)."""


def hybrid(model: ModelConfig, fa_per_layer: int = 2) -> ModelConfig:
    """HydraHead of a dense shape: every layer has the same number of FA heads, of different groups."""
    step = model.num_query_heads // max(fa_per_layer, 1)
    heads = tuple(range(0, step * fa_per_layer, step))
    return dataclasses.replace(
        model, hydra=HydraConfig(), full_attention_heads=(heads,) * model.num_layers
    )


def hybrid_at_ratio(model: ModelConfig, ratio: int = 7) -> ModelConfig:
    """HydraHead of a dense shape at ``ratio``:1, with at least one FA head in every layer.

    FA heads beyond one for each layer are in the first layers; layers have different heads.
    """
    num_heads, num_layers = model.num_query_heads, model.num_layers
    budget = max(num_layers, num_heads * num_layers // (ratio + 1))
    per_layer = [budget // num_layers + (i < budget % num_layers) for i in range(num_layers)]
    heads = tuple(
        tuple(sorted((layer + 2 * i) % num_heads for i in range(count)))
        for layer, count in enumerate(per_layer)
    )
    return dataclasses.replace(model, hydra=HydraConfig(), full_attention_heads=heads)


def smaller(model: ModelConfig, layers: int) -> ModelConfig:
    """The same model with fewer layers; reports must say so."""
    heads = model.full_attention_heads
    return dataclasses.replace(
        model, num_layers=layers, full_attention_heads=None if heads is None else heads[:layers]
    )


def run_config(
    device: torch.device,
    sequence_length: int = 4096,
    recompute: str = "none",
    backend: BackendConfig | None = None,
) -> RunConfig:
    """A finetune run of one process with one sequence in each step.

    Args:
        recompute: ``none``, ``full``, or modules such as ``mlp`` and ``attention+mlp``.
    """
    granularity = recompute if recompute in ("none", "full") else "selective"
    modules = tuple(recompute.split("+")) if granularity == "selective" else ()
    return RunConfig(
        verb="finetune",
        precision="bf16" if device.type == "cuda" else "fp32",
        data=DataConfig(sequence_length=sequence_length),
        batch=BatchConfig(1, 1),
        loss=LossConfig(chunk_tokens=1024),
        recompute=RecomputeConfig(granularity, modules),  # type: ignore[arg-type]
        backend=backend or BackendConfig(),
    )


def compile_kernels(run: RunConfig, model: ModelConfig, teacher: ModelConfig | None) -> None:
    """Compile and check a run's kernels side by side, as training does at its start; without a GPU nothing.

    What compilers print is dropped. If something does not compile, a line says so, and the first step tries.
    """
    with tempfile.TemporaryDirectory(prefix="kernels_") as folder, StopRequest():
        run = dataclasses.replace(run, output=folder)
        uses_teacher = VERBS[run.verb].uses_teacher
        result = compile_once_per_node(
            run, model, teacher if uses_teacher else None, tell=lambda text: print(f"  {text}")
        )
        if result.compiled:
            print(f"  kernels ready after {result.seconds:.0f} s")
        if not result.ready:
            print(f"  warning: {warning_of(result, run.output)}")


def used_kernels(run: RunConfig, model: ModelConfig, device: torch.device) -> dict[str, str]:
    """By key of the ``backend`` section, the back ends that runs of this config took; call it after a run."""
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    case = Case(device, dtype, model.head_dim)
    names = choose_kernels(run.backend, case, check=False).names
    return names | {"gated_delta_net": harness.used_delta_rule(names["gated_delta_net"])}


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Set weights of a realistic size: NaN and zeros would make kernels faster."""
    generator = torch.Generator(platform.device()).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith(("layernorm.weight", "_norm", "gamma")):
            parameter.fill_(1.0)
        elif name.endswith("A_log"):
            parameter.uniform_(0.0, 2.0, generator=generator)
        elif name.endswith("dt_bias"):
            parameter.uniform_(-6.0, -2.0, generator=generator)
        elif parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)


@torch.no_grad()
def random_weights(
    model: ModelConfig, dtype: torch.dtype, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Canonical tensors of a realistic size, drawn on the GPU if there is one, kept on the host.

    Args:
        dtype: of all tensors except decays, which are fp32.
    """
    device = platform.device()
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for key, shape in canonical_shapes(model).items():
        value = torch.empty(shape, dtype=torch.float32 if is_fp32(key) else dtype, device=device)
        if key.endswith(("layernorm.weight", "_norm", "gamma")):
            value.fill_(1.0)
        elif key.endswith("A_log"):
            value.uniform_(0.0, 2.0, generator=generator)
        elif key.endswith("dt_bias"):
            value.uniform_(-6.0, -2.0, generator=generator)
        else:
            # The output projection is stored by head and also sums over heads.
            inputs = shape[-1] * (shape[0] if key.endswith("self_attention.out") else 1)
            value.normal_(std=inputs**-0.5, generator=generator)
        weights[key] = value.cpu()
    return weights
