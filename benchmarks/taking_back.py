#!/usr/bin/env python3
"""Time for the exported model to remove the tokens that assisted decoding has refused.

In a round, ``--draft`` + 1 tokens are verified after a prompt of ``--sizes``, and ``--refused`` of them are
refused. The peers are: no token is removed; ``crop`` runs the delta rule again over the remaining tokens; the
whole model reads these tokens again from a snapshot of its states, as a model must whose cache cannot be
cropped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import _harness as harness
from benchmarks.decode import SHAPE, prefill
from megatron_hydra.errors import HydraError, command
from megatron_hydra.hf.cache_hydrahead import record_past
from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
from megatron_hydra.hf.modeling_hydrahead import HydraHeadForCausalLM

EXAMPLE = "python -m benchmarks.taking_back --device cpu --layers 4 --sizes 512 --threads 2"


def build(args: argparse.Namespace, device: torch.device) -> Any:
    """A model of Qwen3-1.7B's shape with random weights; 2 of 16 heads are FA in every layer."""
    torch.manual_seed(args.seed)
    config = HydraHeadConfig(
        **SHAPE | {"num_hidden_layers": args.layers},
        full_attention_heads=[[0, 8]] * args.layers,
        hydra={},
    )
    with device:
        model = HydraHeadForCausalLM(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model.to(dtype).eval().requires_grad_(False)


def rounds(
    model: Any, prompt: torch.Tensor, args: argparse.Namespace
) -> dict[str, Callable[[], None]]:
    """A round of each peer; each has its own cache, which grows by the kept tokens."""
    drafted = prompt[:, : args.draft + 1]
    kept = drafted.shape[1] - args.refused

    def verify(cache: Any) -> None:
        model(drafted, past_key_values=cache)

    def peer(back: Callable[[Any], None], *, recording: bool) -> Callable[[], None]:
        cache = prefill(model, prompt, args.chunk)
        record_past(cache, recording)

        @torch.inference_mode()
        def run() -> None:
            back(cache)

        return run

    def crop(cache: Any) -> None:
        verify(cache)
        cache.crop(-args.refused)

    def read_again(cache: Any) -> None:
        first = cache.layers[0]
        names = [*first.MEMORIES, "length", "lengths"]
        before = [[getattr(layer, name) for name in names] for layer in cache.layers]
        verify(cache)
        for layer, values in zip(cache.layers, before, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(layer, name, value)
        model(drafted[:, :kept], past_key_values=cache)

    return {
        "nothing taken back": peer(verify, recording=False),
        "crop": peer(crop, recording=True),
        "read again": peer(read_again, recording=False),
    }


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE, sizes="512", what="prompt tokens")
    parser.add_argument("--layers", type=int, default=28, help="default 28, Qwen3-1.7B's")
    parser.add_argument("--draft", type=int, default=5, help="tokens drafted a round (default 5)")
    parser.add_argument("--refused", type=int, default=3, help="of them refused (default 3)")
    parser.add_argument("--chunk", type=int, default=4096, help="prefill chunk (default 4096)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default 1)")
    parser.set_defaults(repeats=16, warmup=2)
    args = parser.parse_args(arguments)
    if not 1 <= args.refused <= args.draft:
        raise HydraError(f"--refused {args.refused} must be between 1 and --draft {args.draft}")
    device = harness.chosen_device(args)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    model = build(args, device)
    report = harness.Report("taking_back", args, device)
    for length in args.sizes:
        generator = torch.Generator().manual_seed(args.seed)
        prompt = torch.randint(1000, (1, length), generator=generator).to(device)
        nothing, crop, again = report.measure(length, rounds(model, prompt, args)).values()
        report.ratio(length, "round with crop / without", harness.Ratio(crop.wall, nothing.wall))
        report.ratio(length, "round with reading again / without",
                     harness.Ratio(again.wall, nothing.wall))  # fmt: skip
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
