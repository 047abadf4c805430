#!/usr/bin/env python3
"""A linear rule, forward and backward, by every implementation that runs here.

On a GPU: FLA's Triton kernels, FlashQLA's through FLA's dispatch (if installed) and our torch twin. ``--rule
kda``: Kimi Delta Attention, by our torch rule and FLA. On the CPU: our torch rule against transformers'
``torch_chunk_gated_delta_rule``. All get the same inputs; outputs are compared before the timing. The time per
token, divided by the first size's, shows how linear a rule is. On the CPU the sizes take turns within a
round, so this ratio is also one within rounds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import _harness as harness
from megatron_hydra.errors import HydraError, command
from megatron_hydra.ops.linear_rules import RULES, FlaKernels

EXAMPLE = "python -m benchmarks.gdn --device cpu --heads 8 --head-dim 64 --sizes 1K,4K,16K"
Rule = Callable[..., torch.Tensor]
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def transformers_rule() -> Rule:
    """The torch rule of transformers. FLA is hidden, because transformers would use its kernels."""
    name = "transformers.models.qwen3_next.modeling_qwen3_next"
    hidden, sys.modules["fla"] = sys.modules.get("fla"), None  # type: ignore[assignment]
    try:
        module = importlib.import_module(name)
    finally:
        if hidden is None:
            del sys.modules["fla"]
        else:
            sys.modules["fla"] = hidden

    def rule(*inputs: torch.Tensor) -> torch.Tensor:
        q, k, v, log_alpha, beta = (x[None] for x in inputs)
        return module.torch_chunk_gated_delta_rule(q, k, v, g=log_alpha, beta=beta)[0][0]

    return rule


def fla_rule(fla: FlaKernels, flash_qla: bool) -> Rule:
    """FLA's rule, with or without its dispatch to FlashQLA."""
    from megatron_hydra.ops.fla_delta_rule import fla_gated_delta_rule

    def rule(*inputs: torch.Tensor) -> torch.Tensor:
        os.environ["FLA_FLASH_QLA"] = "1" if flash_qla else "0"
        return fla_gated_delta_rule(*inputs, fla=fla)[0]

    return rule


def implementations(device: torch.device, skip: list[str], linear: str) -> dict[str, Rule]:
    """Name → rule of (q, k, v, log α, β), the reference first."""
    rules = {"ours (torch)": lambda *inputs: RULES[linear].twin(*inputs)[0]}
    if linear == "gdn":
        rules["transformers (torch)"] = transformers_rule()
    fla = RULES[linear].fla
    if device.type == "cuda" and fla and importlib.util.find_spec("fla"):
        rules["FLA (Triton)"] = fla_rule(fla, flash_qla=False)
        if fla.flash_qla_head_dim and importlib.util.find_spec("flash_qla"):
            rules["FlashQLA"] = fla_rule(fla, flash_qla=True)
    return {name: rule for name, rule in rules.items() if name not in skip}


def make_inputs(length: int, args: argparse.Namespace, device: torch.device) -> list[torch.Tensor]:
    """q, k of unit norm, v; log α with half-lives of 14 tokens and more; β in (0, 1)."""
    generator = torch.Generator(device).manual_seed(args.seed)
    shape = (length, args.heads, args.head_dim)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    decays = (*shape[:2], *RULES[args.rule].decays_of_head(args.head_dim))
    gates = [torch.rand(s, generator=generator, device=device) for s in (decays, shape[:2])]
    inputs = [F.normalize(q, dim=-1).to(dtype), F.normalize(k, dim=-1).to(dtype), v.to(dtype)]
    inputs += [-0.05 * gates[0], gates[1]]
    return [x.requires_grad_() for x in inputs]


@torch.no_grad()
def check_agreement(rules: dict[str, Rule], inputs: list[torch.Tensor], linear: str) -> None:
    """Check that all implementations give the same.

    Raises:
        HydraError: naming the one that does not.
    """
    reference = RULES[linear].twin(*inputs)[0].float()
    for name, rule in rules.items():
        error = float((rule(*inputs).float() - reference).norm() / reference.norm())
        if not error < AGREEMENT[inputs[0].dtype]:
            raise HydraError(f"{name} differs from our torch rule by {error:.1e}")
    if "FlashQLA" in rules and "flash_qla" not in harness.used_delta_rule("fla"):
        raise HydraError(
            "FlashQLA is installed, but FLA's dispatch did not take it; --skip FlashQLA"
        )


def peer(rule: Rule, inputs: list[torch.Tensor], cotangent: torch.Tensor) -> harness.Peer:
    return lambda: torch.autograd.grad(rule(*inputs), inputs, cotangent)


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE, sizes="1K,4K,16K", what="tokens")
    parser.add_argument(
        "--rule", choices=list(RULES), default="gdn", help="hydra.linear (default gdn)"
    )
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default 1)")
    parser.add_argument("--skip", nargs="*", default=[], help="implementations to leave out")
    parser.add_argument("--largest-torch", type=int, default=16384,
                        help="on a GPU, torch rules run up to this size (default 16384)")  # fmt: skip
    args = parser.parse_args(arguments)
    device = harness.chosen_device(args)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    rules = implementations(device, args.skip, args.rule)
    check_agreement(rules, make_inputs(min(args.sizes[0], 1024), args, device), args.rule)
    ratios = {
        "speed-up of ours over transformers": ("transformers (torch)", "ours (torch)"),
        "speed-up of FLA over ours": ("ours (torch)", "FLA (Triton)"),
        "speed-up of FlashQLA over FLA": ("FLA (Triton)", "FlashQLA"),
    }
    report = harness.Report("gdn", args, device, ratios)
    report.note(f"{args.rule}, {args.heads} heads, d = {args.head_dim}, forward + backward")
    fla = RULES[args.rule].fla
    if fla and "FLA (Triton)" in rules:
        operation = fla.module.rpartition(".")[2]
        report.ran(fla=harness.used_delta_rule("fla", operation))
    steps: dict[str, dict[int, harness.Peer]] = {}
    for length in args.sizes:
        inputs = make_inputs(length, args, device)
        cotangent = torch.randn_like(inputs[2])
        peers = {
            name: peer(rule, inputs, cotangent)
            for name, rule in rules.items()
            if device.type == "cpu" or "torch" not in name or length <= args.largest_torch
        }
        report.measure(length, peers)
        for name, step in peers.items():
            steps.setdefault(name, {})[length] = step
    if len(args.sizes) > 1:
        for name, by_length in steps.items():
            _report_linearity(report, name, by_length)
    report.finish()
    return 0


def _report_linearity(
    report: harness.Report, name: str, by_length: dict[int, harness.Peer]
) -> None:
    """Time per token, divided by the first length's; lengths take turns with about equal work."""
    longest, first = max(by_length), next(iter(by_length))

    def repeated(length: int) -> harness.Peer:
        calls = max(1, longest // length)
        return lambda: [by_length[length]() for _ in range(calls)]

    work = {str(length): repeated(length) for length in by_length}
    samples = harness.time_in_turns(
        work, report.device, report.repeats, report.warmup, memory=False
    )
    for length in list(by_length)[1:]:
        for clock in ("wall", "cpu") if report.device.type == "cpu" else ("wall",):
            over, under = (
                [s / (max(1, longest // n) * n) for s in getattr(samples[str(n)], clock)]
                for n in (length, first)
            )
            label = f"{name}: time per token / at {harness.size_name(first)}"
            label += ", CPU time" if clock == "cpu" else ""
            report.ratio(length, label, harness.Ratio(over, under))


if __name__ == "__main__":
    raise SystemExit(main())
