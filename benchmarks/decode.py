#!/usr/bin/env python3
"""Decoding of the exported model against the dense model of the same shape, in Hugging Face format.

Both have random weights and get the same prompt of ``--sizes`` tokens. Prefills take turns, then decode
steps do: one token of the one, one token of the other. Bytes held are counted from the tensors of both
caches. ``--compile`` times both once more with torch.compile over their layers, after all else.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers

from benchmarks import _harness as harness
from megatron_hydra.errors import command
from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
from megatron_hydra.hf.modeling_hydrahead import HydraHeadForCausalLM

EXAMPLE = "python -m benchmarks.decode --device cpu --layers 2 --sizes 8K --threads 2"
SHAPE: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
"""Qwen3-1.7B's."""


def build(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Dense and hybrid with random weights; a 7:1 head map, the same in all layers."""
    torch.manual_seed(args.seed)
    dtype = torch.bfloat16 if device.type == "cuda" or args.bf16 else torch.float32
    shape = SHAPE | {"num_hidden_layers": args.layers}
    dense = transformers.Qwen3Config(**shape)
    heads = [list(range(0, 16, 16 // args.fa_heads))] * args.layers
    hydra = HydraHeadConfig(
        **shape, family="qwen3", qk_norm=True, full_attention_heads=heads, hydra={}
    )
    made = {}
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            made["dense"] = transformers.Qwen3ForCausalLM(dense)
            made["hydra"] = HydraHeadForCausalLM(hydra)
    finally:
        torch.set_default_dtype(default)
    return {name: model.to(dtype).eval().requires_grad_(False) for name, model in made.items()}


def cache_bytes(cache: Any) -> int:
    """Bytes of what a cache holds, by its own tensors."""
    if hasattr(cache, "kv_bytes"):
        return cache.kv_bytes() + cache.state_bytes()
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )


@torch.inference_mode()
def prefill(model: Any, prompt: torch.Tensor, chunk: int) -> Any:
    """The cache of a prompt, read in chunks."""
    cache = None
    for start in range(0, prompt.shape[1], chunk):
        part = prompt[:, start : start + chunk]
        output = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
    return cache


def decoder(model: Any, cache: Any, token: torch.Tensor) -> Callable[[], None]:
    """One greedy step; the cache grows by a token a call."""
    state = {"token": token}

    @torch.inference_mode()
    def step() -> None:
        output = model(state["token"], past_key_values=cache, use_cache=True)
        state["token"] = output.logits[:, -1:].argmax(-1)

    return step


def compile_layers(models: dict[str, Any]) -> None:
    """Compile the layers of both models in place: eager timings come before this."""
    for model in models.values():
        for layer in model.model.layers:
            layer.compile(dynamic=True)


def measure_size(
    length: int,
    models: dict[str, Any],
    args: argparse.Namespace,
    device: torch.device,
    report: harness.Report,
    suffix: str = "",
) -> None:
    """Prefill and decode of one prompt length.

    Args:
        suffix: of peers and labels: which variant of the models this is.
    """
    generator = torch.Generator().manual_seed(args.seed)
    prompt = torch.randint(1000, (args.batch, length), generator=generator).to(device)
    prefills = {
        f"prefill of {name}{suffix}": functools.partial(prefill, model, prompt, args.chunk)
        for name, model in models.items()
    }
    samples = harness.time_in_turns(prefills, device, args.prefill_repeats, 1)
    report.add(length, samples)
    dense, hydra = samples.values()
    report.ratio(length, f"prefill time of hydra / dense{suffix}",
                 harness.Ratio(hydra.wall, dense.wall))  # fmt: skip

    caches = {name: prefill(model, prompt, args.chunk) for name, model in models.items()}
    held = {name: cache_bytes(cache) for name, cache in caches.items()}
    report.note(
        f"cache: dense {held['dense'] / 2**20:.1f} MiB, hydra {held['hydra'] / 2**20:.1f} MiB"
    )
    report.ratio(length, f"cache bytes of hydra / dense{suffix}",
                 harness.Ratio([held["hydra"]], [held["dense"]]))  # fmt: skip
    steps = {
        f"{name}{suffix}": decoder(model, caches[name], prompt[:, -1:])
        for name, model in models.items()
    }
    dense, hydra = report.measure(length, steps).values()
    report.ratio(length, f"decode time of hydra / dense{suffix}",
                 harness.Ratio(hydra.wall, dense.wall))  # fmt: skip


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE, sizes="8K", what="prompt tokens")
    parser.add_argument("--layers", type=int, default=28, help="default 28, Qwen3-1.7B's")
    parser.add_argument("--fa-heads", type=int, default=2, help="of 16 a layer (default 2)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=4096, help="prefill chunk (default 4096)")
    parser.add_argument("--prefill-repeats", type=int, default=3, help="prefills (default 3)")
    parser.add_argument("--bf16", action="store_true", help="bf16 on the CPU too")
    parser.add_argument("--compile", action="store_true", help="compile the layers as well")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default 1)")
    parser.set_defaults(repeats=32, warmup=3)
    args = parser.parse_args(arguments)
    device = harness.chosen_device(args)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    models = build(args, device)
    report = harness.Report("decode", args, device)
    report.note(f"{args.layers} layers of Qwen3-1.7B's shape, batch {args.batch}, "
                f"{next(models['dense'].parameters()).dtype}")  # fmt: skip
    for length in args.sizes:
        measure_size(length, models, args, device, report)
    if args.compile:
        compile_layers(models)
        for length in args.sizes:
            measure_size(length, models, args, device, report, " (compiled)")
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
