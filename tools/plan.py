#!/usr/bin/env python
"""Estimate memory, time and cost of a training run without GPUs. See --help."""

from __future__ import annotations

import argparse

from megatron_hydra.arguments import command_parser, path_text, real
from megatron_hydra.errors import HydraError, command
from megatron_hydra.head_map import DEFAULT_RATIO

DESCRIPTION = """\
For a model, a context length and a number of GPUs, estimate: the memory of a rank (parameters, gradients,
optimizer, activations by part); its FLOPs and communication; the time and cost of a step and of each stage
of the transfer; and the layouts that fit, fastest first. The report compares the dense model, the layer-wise
hybrid and HydraHead.

No job is started and nothing is downloaded. Memory and FLOPs are derived, and tested against measurements on
the CPU. Times are a roofline of the device plus kernel launches of the host, with assumed efficiencies that
the report lists. If the configs of a recipe set validations, the hours of a stage include them.
"""

EPILOG = """\
examples:
  python tools/plan.py --model Qwen/Qwen3-1.7B --seq 524288 --gpus 64 --gpu h200
  python tools/plan.py --model models/Qwen3-8B --head-map map.json --seq 131072 --gpus 32 --gpu h100 \\
      --price-per-gpu-hour 2.5 --tokens 5e9
  python tools/plan.py --model Qwen/Qwen3-1.7B --recipe configs/qwen3_1.7b/paper --gpus 8 --gpu h100
  python tools/plan.py --model Qwen/Qwen3-1.7B --verb distill --seq 4096 --gpus 8 --gpu a100 --json \\
      --efficiency matmul=0.5 --efficiency delta_rule=0.1

docs/planning.md explains the figures and compares them with measurements.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser(description=DESCRIPTION, epilog=EPILOG)
    p.add_argument(
        "--model",
        type=path_text,
        required=True,
        metavar="M",
        help="Qwen/Qwen3-0.6B … Qwen/Qwen3-32B, a config.json or its folder, or a Megatron checkpoint",
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--seq", type=int, default=0, metavar="T", help="sequence length in tokens")
    what.add_argument(
        "--recipe",
        default="",
        metavar="D",
        help="estimate the cost of a recipe instead: a folder with one run config per stage, such as "
        "configs/qwen3_1.7b/paper",
    )
    p.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    p.add_argument("--gpu", required=True, metavar="G", help="GPU type: a100, h100, h200 or b200")
    p.add_argument(
        "--verb",
        choices=("align", "distill", "finetune"),
        help="plan only this stage, with all --tokens (default: layouts of finetune, cost of all stages)",
    )
    which = p.add_mutually_exclusive_group()
    which.add_argument(
        "--ratio", default=DEFAULT_RATIO, help="GDN:FA heads, placed at random (%(default)s)"
    )
    which.add_argument(
        "--head-map",
        type=path_text,
        default="",
        metavar="MAP",
        help="use a head map instead of --ratio",
    )
    p.add_argument(
        "--tokens", type=real(0), default=15e9, help="total tokens of all stages (%(default)g)"
    )
    p.add_argument(
        "--tokens-per-step",
        type=int,
        default=1_048_576,
        metavar="B",
        help="global batch of the planned stage in tokens (%(default)s)",
    )
    p.add_argument(
        "--price-per-gpu-hour",
        type=real(0),
        metavar="X",
        help="price of one GPU hour, in any currency",
    )
    p.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    p.add_argument(
        "--no-distributed-optimizer",
        action="store_true",
        help="keep all optimizer states on every data-parallel rank",
    )
    p.add_argument(
        "--loss-chunk",
        type=int,
        default=2048,
        metavar="C",
        help="tokens per chunk of the loss; logits exist for one chunk at a time (%(default)s)",
    )
    p.add_argument(
        "--gated-delta-net",
        choices=("fla", "torch"),
        default="fla",
        help="torch: plan for GPUs without FLA, with the torch implementation; takes minutes (%(default)s)",
    )
    p.add_argument(
        "--efficiency",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change an assumed efficiency. Shares: matmul, attention, attention_backward, varlen, tail, "
        "delta_rule, flash_qla (0.27 where FlashQLA is installed), bandwidth, nvlink, network, usable, "
        "overlap. Seconds: latency (per collective), launch and triton_launch (of the host, per kernel). "
        "Repeatable",
    )
    p.add_argument("--top", type=int, default=5, help="number of layouts to show (%(default)s)")
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from megatron_hydra.planning.command import Request, plan

    if args.recipe and args.verb:
        raise HydraError(
            "--verb names a stage to plan, but a recipe has its own stages: leave it out"
        )

    request = Request(
        model=args.model,
        sequence_length=args.seq,
        gpus=args.gpus,
        gpu=args.gpu,
        recipe=args.recipe,
        verb=args.verb,
        ratio=args.ratio,
        head_map=args.head_map,
        tokens=args.tokens,
        tokens_per_step=args.tokens_per_step,
        price_per_gpu_hour=args.price_per_gpu_hour,
        precision=args.precision,
        distributed_optimizer=not args.no_distributed_optimizer,
        loss_chunk=args.loss_chunk,
        gated_delta_net=args.gated_delta_net,
        efficiency=tuple(args.efficiency),
        top=args.top,
        as_json=args.json,
    )
    return plan(request, lambda line: print(line, flush=True))


if __name__ == "__main__":
    raise SystemExit(main())
