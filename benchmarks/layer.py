#!/usr/bin/env python3
"""The attention core of one layer, forward and backward: HydraHead against all heads full attention.

The core is everything between the input projection's output and the output projection's input: short
convolution, q/k preparation, both branches, gates, norm, scale. ``all-FA`` is the dense model's core of the
same shape (QK-norm, rotary, attention), once for every FA kernel that runs here; the best of them is the peer.
``FA alone`` and ``GDN alone`` are the hybrid's branches with their share of the tail. The mixing tax is the
hybrid's time divided by the sum of the two. ``… kernel`` rows time the bare kernels. The input is one document;
a size is its number of tokens.

``--graph`` also times hybrid and best peer as replayed CUDA graphs. They exclude the host's launch time, which
short sequences do not hide.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from benchmarks import _harness as harness
from benchmarks import _models as models
from megatron_hydra.errors import command

from megatron.core.transformer.spec_utils import build_module  # isort: skip
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.model.full_attention import FullAttentionInputs
from megatron_hydra.model.gated_delta_net import GatedDeltaNetInputs
from megatron_hydra.model.head_projections import HeadInputs
from megatron_hydra.model.hydra_attention import HydraAttention
from megatron_hydra.model.layer_spec import hydra_layer_spec, transformer_config
from megatron_hydra.ops import gpu_attention
from megatron_hydra.ops.backends import choose_kernels
from megatron_hydra.ops.kernels import Case, Kernels
from megatron_hydra.parallel.head_weights import padded_rows, split_segments
from megatron_hydra.parallel.packed_sequence import PackedSequence
from megatron_hydra.parallel.world import start_world, stop_world

EXAMPLE = "python -m benchmarks.layer --sizes 8K,32K,128K,512K --repeats 5"
SLOW_KERNELS = ("flash", "varlen")
"""Full-attention kernels without Hopper's instructions; they do not run at the largest sizes."""


def build_core(model: ModelConfig, kernels: Kernels, device: torch.device) -> HydraAttention:
    """One attention layer with random parameters."""
    run = models.run_config(device)
    config = transformer_config(model, run)
    spec = hydra_layer_spec(model, run, kernels).submodules.self_attention
    layer = build_module(spec, config=config, layer_number=1).to(device)
    models.randomise(layer)
    return layer


class Core:
    """A layer's core on one stream of tokens: from a fused projection to o_proj's input.

    Args:
        layer: the attention layer.
        tokens: T.
        device: where it runs.
        seed: of the projection's values.
        branch: ``fa`` or ``gdn`` for that branch's projections alone; empty for both.
    """

    def __init__(
        self,
        layer: HydraAttention,
        tokens: int,
        device: torch.device,
        seed: int,
        branch: str = "",
    ) -> None:
        self.layer = layer
        self.segments = [s for s in layer.projections.in_segments if s.key.startswith(branch)]
        self.packed = PackedSequence((0, tokens), device=device)
        generator = torch.Generator(device).manual_seed(seed)
        dtype = layer.config.params_dtype
        # As the layer's; a branch's own number would not be a multiple either.
        rows = padded_rows(self.segments)
        self.projected = torch.randn(
            tokens, rows, generator=generator, device=device, dtype=dtype
        ).requires_grad_()
        trained = [*(layer.fa or torch.nn.Module()).parameters()]
        trained += [*(layer.gdn or torch.nn.Module()).parameters()]
        self.trained = [self.projected, *trained]
        self.cotangent: dict[int, torch.Tensor] = {}

    def inputs(self) -> HeadInputs:
        """The branches' inputs."""
        rows = split_segments(self.projected, self.segments, 1)
        fa = {name: rows.get(f"fa.{name}") for name in FullAttentionInputs._fields}
        gdn = {name: rows.get(f"gdn.{name}") for name in GatedDeltaNetInputs._fields}
        return HeadInputs(
            None if fa["qk"] is None else FullAttentionInputs(**fa),
            None if gdn["qkv"] is None else GatedDeltaNetInputs(**gdn),
            None,
        )

    def both(self) -> torch.Tensor:
        """The whole core."""
        mixed, _ = self.layer.mix(self.inputs(), self.packed, None)
        assert mixed is not None
        return mixed

    def fa_alone(self) -> torch.Tensor:
        """The FA branch and its part of the tail."""
        inputs, layer = self.inputs().fa, self.layer
        output = layer.full_attention(inputs.qk, inputs.v, self.packed)
        gamma = layer.fusion.gamma[: output.shape[1]] if layer.fusion.gamma is not None else None
        return layer.fusion.tail([(output, inputs.gate)], gamma)

    def gdn_alone(self) -> torch.Tensor:
        """The GDN branch and its part of the tail."""
        inputs, layer = self.inputs().gdn, self.layer
        assert layer.gdn is not None
        output = layer.gdn(inputs, self.packed)
        gamma = layer.fusion.gamma[-output.shape[1] :] if layer.fusion.gamma is not None else None
        return layer.fusion.tail([(output, inputs.gate)], gamma)

    def step(self, forward: Callable[[], torch.Tensor]) -> harness.Peer:
        """Forward and backward, with gradients by the projections and the branches' parameters."""

        def run() -> None:
            output = forward()
            columns = output.shape[1]
            if columns not in self.cotangent:
                self.cotangent[columns] = torch.randn_like(output)
            torch.autograd.grad(output, self.trained, self.cotangent[columns], allow_unused=True)

        return run


def on_one_stream(layer: HydraAttention, peer: harness.Peer) -> harness.Peer:
    """The same with both branches of its layer on the current stream (``backend.streams=one``)."""

    def run() -> None:
        layer.two_streams = False
        try:
            peer()
        finally:
            layer.two_streams = True

    return run


def flash_attn_4() -> gpu_attention.Attention:
    """flash-attn 4's kernels in CuTe (``pip install flash-attn-4``); whole streams, no windows.

    Raises:
        ImportError: it is not installed.
    """
    from flash_attn.cute import flash_attn_varlen_func

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: Any, cu_k: Any
    ) -> torch.Tensor:
        starts_q, starts_k, longest_q, longest_k = gpu_attention.device_boundaries(
            cu_q, cu_k, q.device
        )
        out = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=longest_q,
            max_seqlen_k=longest_k, causal=True,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return attention


def flash_attn(module: str) -> gpu_attention.Attention:
    """flash-attn of one version, 3 (``flash_attn_interface``) or 2 (``flash_attn``).

    Raises:
        ImportError: it is not installed.
    """
    function = importlib.import_module(module).__dict__.get("flash_attn_varlen_func")
    if function is None:  # flash-attn 4 has the package's name as well
        raise ImportError(f"{module} has no flash_attn_varlen_func")

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: Any, cu_k: Any
    ) -> torch.Tensor:
        out = function(q, k, v, *gpu_attention.device_boundaries(cu_q, cu_k, q.device), causal=True)
        return out[0] if isinstance(out, tuple) else out

    return attention


LIBRARIES: dict[str, Callable[[], gpu_attention.Attention]] = {
    "varlen": gpu_attention.torch_varlen,
    "flash-attn 2": functools.partial(flash_attn, "flash_attn"),
    "flash-attn 3": functools.partial(flash_attn, "flash_attn_interface"),
    "flash-attn 4": flash_attn_4,
    "Transformer Engine": gpu_attention.transformer_engine_varlen,
}
"""Full-attention kernels in addition to SDPA's, by name."""


def full_attention_kernels(
    device: torch.device,
) -> tuple[dict[str, gpu_attention.Attention], dict[str, str]]:
    """Every full-attention kernel that can run here, and why the others cannot, by name."""
    if device.type != "cuda":
        from megatron_hydra.ops.varlen_attention import varlen_attention

        names = ("cuDNN", "flash", *LIBRARIES)
        return {"torch": varlen_attention}, dict.fromkeys(names, "it needs a GPU")
    made: dict[str, gpu_attention.Attention] = {
        "cuDNN": functools.partial(
            gpu_attention.sdpa_attention, kernels=[SDPBackend.CUDNN_ATTENTION]
        ),
        "flash": functools.partial(
            gpu_attention.sdpa_attention, kernels=[SDPBackend.FLASH_ATTENTION]
        ),
    }
    missing = {}
    for name, load in LIBRARIES.items():
        try:
            made[name] = load()
        except (ImportError, OSError, RuntimeError) as error:  # absent, or built for another torch
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return made, missing


def bare_kernels(
    tokens: int, model: ModelConfig, kernels: Kernels, device: torch.device
) -> dict[str, harness.Peer]:
    """The kernels alone on prepared inputs: all heads FA, the hybrid's FA heads, its GDN heads."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    d, fa, gdn = model.head_dim, len(model.fa_heads(0)), len(model.gdn_heads(0))

    def tensors(*heads: int) -> list[torch.Tensor]:
        return [
            torch.randn(tokens, n, d, device=device, dtype=dtype).requires_grad_() for n in heads
        ]

    def step(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> harness.Peer:
        cotangent = torch.randn(tokens, inputs[0].shape[1], d, device=device, dtype=dtype)
        return lambda: torch.autograd.grad(function(*inputs), inputs, cotangent)

    cu = (0, tokens)
    qk = [torch.nn.functional.normalize(x.detach(), dim=-1) for x in tensors(gdn, gdn)]
    gates = [torch.rand(tokens, gdn, device=device) for _ in range(2)]
    delta = [*qk, *tensors(gdn), -0.05 * gates[0], gates[1]]
    everything = tensors(model.num_query_heads, model.num_kv_heads, model.num_kv_heads)
    return {
        "all-FA kernel": step(lambda *x: kernels.attention(*x, cu, cu), everything),
        "FA kernel": step(lambda *x: kernels.attention(*x, cu, cu), tensors(fa, fa, fa)),
        "GDN kernel": step(
            lambda *x: kernels.delta_rule(*x, cu)[0], [x.requires_grad_() for x in delta]
        ),
    }


def measure_size(
    tokens: int, args: argparse.Namespace, device: torch.device, report: harness.Report
) -> None:
    """All peers at one size."""
    hybrid = models.hybrid(models.QWEN3_1_7B, args.fa_heads)
    case = Case(device, torch.bfloat16 if device.type == "cuda" else torch.float32, hybrid.head_dim)
    kernels = choose_kernels(models.run_config(device).backend, case, check=False)
    mixed = Core(build_core(hybrid, kernels, device), tokens, device, args.seed)
    peers: dict[str, harness.Peer] = {
        "hydra": mixed.step(mixed.both),
        "hydra, one stream": on_one_stream(mixed.layer, mixed.step(mixed.both)),
    }
    fa, gdn = (Core(mixed.layer, tokens, device, args.seed, branch) for branch in ("fa", "gdn"))
    peers |= {"FA alone": fa.step(fa.fa_alone), "GDN alone": gdn.step(gdn.gdn_alone)}
    dense_peers: list[str] = []
    attentions, missing = full_attention_kernels(device)
    for name, reason in missing.items():
        report.note(f"no all-FA ({name}) at {harness.size_name(tokens)}: {reason}")
    for name, attention in attentions.items():
        if name in SLOW_KERNELS and tokens > args.largest_slow:
            continue
        dense = dataclasses.replace(kernels, attention=attention)
        core = Core(build_core(models.QWEN3_1_7B.dense(), dense, device), tokens, device, args.seed)
        peers[f"all-FA ({name})"] = core.step(core.both)
        dense_peers.append(f"all-FA ({name})")
    if args.kernels:
        peers |= bare_kernels(tokens, hybrid, kernels, device)
    if args.graph and device.type == "cuda" and tokens <= args.largest_slow:
        peers |= {f"{n} (graph)": harness.graphed(peers[n]) for n in ("hydra", *dense_peers)}
    samples = report.measure(tokens, peers)
    report.ran(**models.used_kernels(models.run_config(device), hybrid, device))
    best = fastest({name: samples[name] for name in dense_peers})
    for name in dense_peers:
        if samples[name].wall and name != best:
            ratio = harness.Ratio(samples[name].wall, samples[best].wall)
            report.ratio(tokens, f"time of {name} over {best}", ratio)
    _report_ratios(tokens, samples, best, report)
    if args.profile and device.type == "cuda" and report.output is not None:
        ran = [name for name in ("hydra", best) if name and samples[name].wall]
        text = "".join(harness.profile(peers[name], f"{name}, {tokens}") for name in ran)
        (report.output / f"layer_profile_{harness.size_name(tokens)}.txt").write_text(text)


def fastest(samples: dict[str, harness.Sample]) -> str:
    """The name with the least median; empty without timings."""
    timed = [name for name, sample in samples.items() if sample.wall]
    return min(timed, key=lambda name: samples[name].median, default="")


def _report_ratios(
    tokens: int, samples: dict[str, harness.Sample], best: str, report: harness.Report
) -> None:
    """Ratios against the best all-FA core, and the mixing tax."""
    if best:
        report.note(f"best all-FA at {harness.size_name(tokens)}: {best}")
        report.ratio(tokens, "speed-up of hydra over the best all-FA",
                     harness.Ratio(samples[best].wall, samples["hydra"].wall))  # fmt: skip
    graphs = {n: s for n, s in samples.items() if n.startswith("all-FA") and n.endswith("(graph)")}
    best_graph = fastest(graphs)
    if best_graph and samples["hydra (graph)"].wall:
        report.note(f"best all-FA graph at {harness.size_name(tokens)}: {best_graph}")
        report.ratio(tokens, "the same as CUDA graphs",
                     harness.Ratio(graphs[best_graph].wall, samples["hydra (graph)"].wall))  # fmt: skip
    apart = [
        a + b for a, b in zip(samples["FA alone"].wall, samples["GDN alone"].wall, strict=False)
    ]
    for name in ("hydra", "hydra, one stream"):
        report.ratio(tokens, f"mixing tax of {name}", harness.Ratio(samples[name].wall, apart))


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE, sizes="8K,32K,128K,512K", what="tokens")
    parser.add_argument("--fa-heads", type=int, default=2, help="of 16 heads a layer (default 2)")
    parser.add_argument("--kernels", action="store_true", help="time the bare kernels as well")
    parser.add_argument("--graph", action="store_true", help="time CUDA graphs as well")
    parser.add_argument("--profile", action="store_true",
                        help="write tables of kernel times into --output")  # fmt: skip
    parser.add_argument("--largest-slow", type=int, default=32768,
                        help="slower FA kernels and graphs run up to this size (default 32768)")  # fmt: skip
    args = parser.parse_args(arguments)
    device = harness.chosen_device(args)
    report = harness.Report("layer", args, device)
    report.note(
        f"16 query heads, 8 KV heads, d = 128, {args.fa_heads} FA : {16 - args.fa_heads} GDN, "
        "forward + backward of one layer's attention core, one document"
    )
    start_world(models.run_config(device))
    try:
        for tokens in args.sizes:
            measure_size(tokens, args, device, report)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        stop_world()
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
