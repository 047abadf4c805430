#!/usr/bin/env python3
"""Attention of a long document's last queries, forward and backward: two dense products against other kernels.

A context-parallel rank computes such blocks: the last ``1 / (2 · ranks)`` of the queries against all keys. One
size is the number of keys. On a GPU: cuDNN's two products (``ops.tail_attention``), torch's kernel of packed
documents, and one product without a mask of the same FLOPs, which is the least that any can take. On the CPU:
flash attention of torch for the CPU in place of cuDNN, and the twin, which has a mask.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from benchmarks import _harness as harness
from megatron_hydra.errors import HydraError, command
from megatron_hydra.ops import gpu_attention, tail_attention
from megatron_hydra.ops.varlen_attention import varlen_attention

EXAMPLE = "python -m benchmarks.tail_attention --sizes 128K,256K,512K --ranks 4"
OURS, PACKED, LEAST = "two products", "packed documents", "one product of the same FLOPs"


def peers_of(keys: int, args: argparse.Namespace, device: torch.device) -> dict[str, harness.Peer]:
    """Forward and backward of every kernel on the same tensors.

    Raises:
        HydraError: a size that the ranks do not divide.
    """
    if keys % (2 * args.ranks):
        raise HydraError(f"--sizes {keys}: not a multiple of 2 · {args.ranks} (--ranks)")
    queries, dtype = (
        keys // (2 * args.ranks),
        torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    generator = torch.Generator(device).manual_seed(args.seed)

    def normal(tokens: int, heads: int) -> torch.Tensor:
        shape = (tokens, heads, args.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()

    q, k, v = normal(queries, args.heads), normal(keys, args.groups), normal(keys, args.groups)
    cotangent = torch.randn_like(q)
    on_gpu = device.type == "cuda"
    kernel: tail_attention.DenseKernel = tail_attention.CpuKernel()
    packed: gpu_attention.Attention = varlen_attention
    if on_gpu:
        kernel, packed = tail_attention.CudnnKernel(), gpu_attention.torch_varlen()

    def least() -> None:
        # As many pairs of a query and a key as the causal block has.
        count = keys - (queries - 1) // 2
        some = [x[:count].transpose(0, 1)[None] for x in (k, v)]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], *some, enable_gqa=args.heads != args.groups
        )
        torch.autograd.grad(out, (q, k, v), cotangent.transpose(0, 1)[None])

    def ours() -> None:
        out = tail_attention.tail_attention(q, k, v, kernel)
        torch.autograd.grad(out, (q, k, v), cotangent)

    def others() -> None:
        torch.autograd.grad(packed(q, k, v, (0, queries), (0, keys)), (q, k, v), cotangent)

    return {OURS: ours, PACKED: others, LEAST: least}


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE, sizes="128K,256K,512K", what="keys")
    parser.add_argument("--ranks", type=int, default=4, help="that share the sequence (default 4)")
    parser.add_argument("--heads", type=int, default=2, help="FA heads (default 2)")
    parser.add_argument("--groups", type=int, default=2, help="KV groups (default 2)")
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args(arguments)
    device = harness.chosen_device(args)
    report = harness.Report("tail_attention", args, device)
    report.note(f"{args.heads} heads, {args.groups} KV groups, d = {args.head_dim}")
    if device.type == "cuda":
        wrong = tail_attention.what_is_wrong(tail_attention.CudnnKernel(), device, args.head_dim)
        report.note(f"cuDNN's two products: {wrong or 'right'}")
    for keys in args.sizes:
        peers = peers_of(keys, args, device)
        samples = harness.time_in_turns(peers, device, args.repeats, args.warmup)
        report.add(keys, samples)
        for name in (PACKED, LEAST):
            if samples[OURS].wall and samples[name].wall:
                ratio = harness.Ratio(samples[OURS].wall, samples[name].wall)
                report.ratio(keys, f"time of {OURS} / {name}", ratio)
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
