#!/usr/bin/env python3
"""Our fused kernels against the bandwidth of a plain copy on this device.

Every tensor that a kernel must read or write counts once. Time is of one kernel call, forward or backward,
replayed as a CUDA graph, so that launches do not count. The torch twin is timed, too.
``--sweep`` tries block heights and warps. One size is the number of tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import torch

from benchmarks import _harness as harness
from megatron_hydra.errors import command
from megatron_hydra.model.rotary import rotary_tables
from megatron_hydra.ops import fusion_tail, qk_preparation, short_conv

EXAMPLE = "python -m benchmarks.fused --sizes 8K,32K,128K"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One fused kernel at one size.

    Attributes:
        fused, twin: the two implementations, of ``inputs``.
        inputs: tensors; those that require gradients get them.
        forward_bytes, backward_bytes: bytes that each must move.
    """

    fused: Callable
    twin: Callable
    inputs: list[torch.Tensor]
    forward_bytes: int
    backward_bytes: int


def size_of(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def fused_functions(device: torch.device) -> dict[str, Callable]:
    """The Triton kernels; on the CPU the twins replace them, to try this script."""
    if device.type == "cpu":
        return {
            "tail": fusion_tail.fusion_tail,
            "prepare": qk_preparation.prepare_heads,
            "conv": short_conv.short_conv,
        }
    from megatron_hydra.ops import triton_fusion_tail, triton_qk_preparation, triton_short_conv

    return {
        "tail": triton_fusion_tail.fusion_tail,
        "prepare": triton_qk_preparation.prepare_heads,
        "conv": triton_short_conv.short_conv,
    }


def kernels(tokens: int, args: argparse.Namespace, device: torch.device) -> dict[str, Kernel]:
    """The layer's kernels at ``--fa`` FA and ``--gdn`` GDN heads; inputs are columns of projections."""
    d, dtype = args.head_dim, torch.bfloat16 if device.type == "cuda" else torch.float32
    functions = fused_functions(device)
    generator = torch.Generator(device).manual_seed(args.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def heads(count: int) -> torch.Tensor:
        return normal(tokens, count * d).requires_grad_()

    positions = torch.arange(tokens, device=device)
    frequencies = 1e6 ** -(torch.arange(0, d, 2).float() / d)
    tables = rotary_tables(positions, frequencies, 1.0)
    halves = size_of(*tables) // 2  # the second half of a table row repeats the first
    scale = 1 + torch.rand(tokens, device=device)
    weight, gamma = normal(d).requires_grad_(), normal(args.fa + args.gdn).requires_grad_()
    taps = normal(args.gdn * d, 4).requires_grad_()

    fa, gdn, fa_gate, gdn_gate = heads(args.fa), heads(args.gdn), heads(args.fa), heads(args.gdn)
    joined = size_of(fa, gdn)

    def tail(function: Callable) -> Callable:
        return lambda a, b, ga, gb, g: function(
            [(_heads(a, d), _heads(ga, d)), (_heads(b, d), _heads(gb, d))], g, 1e-6
        )

    def gdn_q(function: Callable) -> Callable:
        return lambda x, w: function(_heads(x, d), w, 1e-6, tables, None, True)

    def fa_q(function: Callable) -> Callable:
        return lambda x, w: function(_heads(x, d), w, 1e-6, None, scale, False)

    def conv(function: Callable) -> Callable:
        return lambda x, w: function(x, w, positions)

    gdn_x, fa_x, conv_x = heads(args.gdn), heads(16), heads(args.gdn)
    return {
        "fusion tail": Kernel(tail(functions["tail"]), tail(fusion_tail.fusion_tail),
                              [fa, gdn, fa_gate, gdn_gate, gamma], 3 * joined, 5 * joined),
        "q/k preparation (GDN)": Kernel(gdn_q(functions["prepare"]),
                                        gdn_q(qk_preparation.prepare_heads), [gdn_x, weight],
                                        2 * size_of(gdn_x) + halves, 3 * size_of(gdn_x) + halves),
        "q/k preparation (FA, 16 heads)": Kernel(fa_q(functions["prepare"]),
                                                 fa_q(qk_preparation.prepare_heads), [fa_x, weight],
                                                 2 * size_of(fa_x), 3 * size_of(fa_x)),
        "short convolution": Kernel(conv(functions["conv"]), conv(short_conv.short_conv),
                                    [conv_x, taps], 2 * size_of(conv_x), 3 * size_of(conv_x)),
    }  # fmt: skip


def _heads(x: torch.Tensor, d: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, d))


def copy_bandwidth(device: torch.device, args: argparse.Namespace) -> float:
    """Bytes read and written per second in a large device-to-device copy."""
    elements = 1 << (30 if device.type == "cuda" else 25)
    source = torch.empty(elements, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    sample = harness.time_in_turns({"copy": lambda: target.copy_(source)}, device, args.repeats, 2)
    return 2 * size_of(source) / sample["copy"].median


def peers(kernel: Kernel) -> tuple[dict[str, harness.Peer], dict[str, harness.Peer]]:
    """Forward and backward peers; all backwards use one kept graph."""
    forward, backward = {}, {}
    for name, function in (("fused", kernel.fused), ("torch twin", kernel.twin)):
        with torch.no_grad():
            output = function(*kernel.inputs)
        cotangent = torch.randn_like(output)

        def run(function: Callable = function) -> None:
            with torch.no_grad():
                function(*kernel.inputs)

        stream = torch.cuda.Stream() if output.is_cuda else None
        with torch.cuda.stream(stream):  # None: no effect
            graph = function(*kernel.inputs)

        def back(graph: torch.Tensor = graph, cotangent: torch.Tensor = cotangent) -> None:
            torch.autograd.grad(graph, kernel.inputs, cotangent, retain_graph=True)

        forward[name] = harness.graphed(run) if stream else run
        backward[name] = harness.graphed(back, stream) if stream else back
    return forward, backward


def sweep(tokens: int, args: argparse.Namespace, device: torch.device, bandwidth: float) -> list:
    """Share of the copy bandwidth for every (rows, warps) of both row kernels."""
    from megatron_hydra.ops import triton_fusion_tail, triton_qk_preparation

    lines = []
    for rows, warps in ((8, 4), (16, 8), (32, 4), (32, 8)):
        for module in (triton_fusion_tail, triton_qk_preparation):
            module.ROWS, module.WARPS = rows, warps
        for name, kernel in list(kernels(tokens, args, device).items())[:2]:
            forward, backward = peers(kernel)
            times = [
                harness.time_in_turns({"fused": part["fused"]}, device, 3, 2)["fused"].median
                for part in (forward, backward)
            ]
            shares = [kernel.forward_bytes / times[0] / bandwidth,
                      kernel.backward_bytes / times[1] / bandwidth]  # fmt: skip
            lines.append(f"sweep {name}: rows {rows}, warps {warps}: "
                         f"forward {shares[0]:.2f}, backward {shares[1]:.2f}")  # fmt: skip
    return lines


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE, sizes="8K,32K,128K", what="tokens")
    parser.add_argument("--fa", type=int, default=2, help="FA heads (default 2)")
    parser.add_argument("--gdn", type=int, default=14, help="GDN heads (default 14)")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--sweep", action="store_true", help="try block shapes at the last size")
    args = parser.parse_args(arguments)
    device = harness.chosen_device(args)
    report = harness.Report("fused", args, device)
    bandwidth = copy_bandwidth(device, args)
    report.note(f"a copy moves {bandwidth / 1e9:,.0f} GB/s")
    for tokens in args.sizes:
        for name, kernel in kernels(tokens, args, device).items():
            directions = zip(("forward", "backward"), peers(kernel), strict=True)
            for direction, named in directions:
                moved = kernel.forward_bytes if direction == "forward" else kernel.backward_bytes
                samples = harness.time_in_turns(named, device, args.repeats, args.warmup)
                label = f"{name}, {direction}"
                report.add(tokens, {f"{label}: {n}": s for n, s in samples.items()}, bytes=moved)
                ideal = [moved / bandwidth] * args.repeats
                report.ratio(tokens, f"{label}: share of the copy bandwidth",
                             harness.Ratio(ideal, samples["fused"].wall))  # fmt: skip
                report.ratio(tokens, f"{label}: speed-up over the twin",
                             harness.Ratio(samples["torch twin"].wall, samples["fused"].wall))  # fmt: skip
    if args.sweep and device.type == "cuda":
        for line in sweep(args.sizes[-1], args, device, bandwidth):
            report.note(line)
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
