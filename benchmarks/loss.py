#!/usr/bin/env python3
"""The chunked KD loss against full logits: time and peak memory, forward and backward.

``materialised`` is the plain code: both heads' logits, KL of two log-softmaxes plus cross-entropy, autograd.
``materialised (compiled)`` is the same with torch.compile. Losses are compared before the timing.

``--liger`` adds Liger-Kernel's fused losses (``pip install liger-kernel==0.8.5``). They have no cross-entropy
beside the divergence, so all peers then use 1 as the weight of KL; ours still computes the cross-entropy.
``FusedLinearKLDivLoss`` takes the teacher's probabilities of all tokens, in the inputs' dtype; making them is
within its time. ``FusedLinearJSD`` takes the teacher's hidden states, as ours does; at β = 0 it is KL.

Peak memory is measured by torch's allocator, without the inputs. It is reported twice: with the gradients
that every implementation returns (by the hidden states, N·D, and by the weight, V·D), and without the
gradient by the hidden states, the only part that must grow with the tokens.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import _harness as harness
from megatron_hydra.errors import HydraError, command
from megatron_hydra.ops.linear_distillation_loss import linear_distillation_loss

EXAMPLE = """python -m benchmarks.loss --sizes 8K --hidden 2048 --vocabulary 151936
  python -m benchmarks.loss --sizes 8K --liger
  python -m benchmarks.loss --device cpu --sizes 1K,2K,4K,8K --hidden 128 --vocabulary 16384 \\
      --only-ours --repeats 1 --warmup 1                # flat memory"""
KL_WEIGHT = 0.9
LIGER_KL, LIGER_JSD = "Liger FusedLinearKLDivLoss", "Liger FusedLinearJSD"
Loss = Callable[..., torch.Tensor]


def materialised(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    kl_weight: float = KL_WEIGHT,
) -> torch.Tensor:
    """λ·KL + (1−λ)·CE from full logits."""
    logits = F.linear(hidden, weight).float()
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(teacher_hidden, teacher_weight).float(), dim=-1)
    kl = F.kl_div(F.log_softmax(logits, dim=-1), teacher, log_target=True, reduction="sum")
    return kl_weight * kl + (1 - kl_weight) * F.cross_entropy(logits, labels, reduction="sum")


def liger_losses() -> dict[str, Loss]:
    """Liger-Kernel's fused losses of a linear layer, both KL(teacher ‖ student).

    Raises:
        HydraError: it is not installed, or too old for both.
    """
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
        from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss
    except ImportError as error:
        raise HydraError(f"--liger: {error}; pip install liger-kernel==0.8.5") from error
    divergence = LigerFusedLinearKLDivLoss(reduction="sum")
    jensen_shannon = LigerFusedLinearJSD(jsd_beta=0.0)

    def kl(labels: torch.Tensor, **x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = F.linear(x["teacher_hidden"], x["teacher_weight"]).softmax(-1)
        return divergence(x["hidden"], x["weight"], target)

    def jsd(labels: torch.Tensor, **x: torch.Tensor) -> torch.Tensor:
        return jensen_shannon(
            x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"], labels
        )

    return {LIGER_KL: kl, LIGER_JSD: jsd}


def make_inputs(tokens: int, args: argparse.Namespace, device: torch.device) -> dict:
    generator = torch.Generator(device).manual_seed(args.seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return values * scale

    d, vocabulary = args.hidden, args.vocabulary
    return {
        "hidden": normal(tokens, d).requires_grad_(),
        "weight": normal(vocabulary, d, scale=d**-0.5).requires_grad_(),
        "labels": torch.randint(vocabulary, (tokens,), generator=generator, device=device),
        "teacher_hidden": normal(tokens, d),
        "teacher_weight": normal(vocabulary, d, scale=d**-0.5),
    }


def peers_of(inputs: dict, args: argparse.Namespace, device: torch.device) -> dict:
    """Name → function of the inputs that returns the loss."""
    mask = torch.ones(inputs["labels"].shape, device=device)
    kl_weight = 1.0 if args.liger else KL_WEIGHT

    def ours(fused: bool | None, chunk: int, fp32_logits: bool = True) -> Loss:
        def loss(labels: torch.Tensor, **x: torch.Tensor) -> torch.Tensor:
            return linear_distillation_loss(
                x["hidden"],
                x["weight"],
                labels,
                mask,
                teacher_hidden=x["teacher_hidden"],
                teacher_weight=x["teacher_weight"],
                kl_weight=kl_weight,
                chunk_tokens=chunk,
                fused=fused,
                fp32_logits=fp32_logits,
            ).loss

        return loss

    full = functools.partial(materialised, kl_weight=kl_weight)
    losses: dict[str, Loss] = {} if args.only_ours else {"materialised": full}
    if args.compiled:
        losses["materialised (compiled)"] = torch.compile(full, dynamic=False)
    if args.liger:
        losses |= liger_losses()
    losses["ours"] = ours(None, args.chunk)
    if device.type == "cuda":
        losses["ours (torch passes)"] = ours(False, args.chunk)
        losses[f"ours, chunk {2 * args.chunk}"] = ours(None, 2 * args.chunk)
        losses["ours, bf16 logits"] = ours(None, args.chunk, fp32_logits=False)
        losses[f"ours, bf16 logits, chunk {2 * args.chunk}"] = ours(None, 2 * args.chunk, False)
    return losses


def step(loss: Loss, inputs: dict) -> harness.Peer:
    return lambda: torch.autograd.grad(loss(**inputs), [inputs["hidden"], inputs["weight"]])


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE, sizes="8K", what="tokens")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens a chunk (default 1024)")
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile the materialised one"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default 1)")
    parser.add_argument(
        "--only-ours", action="store_true", help="without full logits: memory against tokens"
    )
    parser.add_argument("--liger", action="store_true", help="Liger-Kernel's losses; KL alone")
    args = parser.parse_args(arguments)
    device = harness.chosen_device(args)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    ratios = {
        "time of ours / materialised": ("ours", "materialised"),
        "time of ours / materialised (compiled)": ("ours", "materialised (compiled)"),
    }
    report = harness.Report("loss", args, device, ratios)
    weight = 1.0 if args.liger else KL_WEIGHT
    report.note(f"D = {args.hidden}, V = {args.vocabulary}, KL weight {weight}, chunk {args.chunk}")
    peaks: dict[str, list[int]] = {}
    for tokens in args.sizes:
        inputs = make_inputs(tokens, args, device)
        losses = peers_of(inputs, args, device)
        check_agreement(losses, inputs)
        samples = report.measure(
            tokens, {name: step(loss, inputs) for name, loss in losses.items()}
        )
        _report_memory(report, tokens, samples)
        for name, sample in samples.items():
            if sample.peak_bytes is not None:
                peaks.setdefault(name, []).append(sample.peak_bytes)
    _report_growth(report, peaks, args, inputs["hidden"].element_size())
    report.finish()
    return 0


def check_agreement(losses: dict[str, Loss], inputs: dict) -> None:
    """Check that all compute the same loss.

    Raises:
        HydraError: naming the one that does not.
    """
    values = {name: float(loss(**inputs)) for name, loss in losses.items()}
    if LIGER_JSD in values:  # it is a mean; the sum is taken here, outside the timing
        values[LIGER_JSD] *= len(inputs["labels"])
    first, expected = next(iter(values.items()))
    for name, value in values.items():
        if not abs(value / expected - 1) < 1e-2:
            raise HydraError(f"{name}: loss {value}, {first} {expected}")


def _report_memory(report: harness.Report, tokens: int, samples: dict[str, harness.Sample]) -> None:
    most = samples["materialised"].peak_bytes if "materialised" in samples else None
    for name, sample in samples.items():
        if name != "materialised" and most and sample.peak_bytes:
            share = harness.Ratio([sample.peak_bytes], [most])
            report.ratio(tokens, f"memory of {name} / materialised", share)
    for name, peer in itertools.product(samples, (LIGER_KL, LIGER_JSD)):
        if not name.startswith("ours") or peer not in samples:
            continue
        own, its = samples[name], samples[peer]
        report.ratio(tokens, f"time of {name} / {peer}", harness.Ratio(own.wall, its.wall))
        if own.peak_bytes and its.peak_bytes:
            share = harness.Ratio([own.peak_bytes], [its.peak_bytes])
            report.ratio(tokens, f"memory of {name} / {peer}", share)


def _report_growth(
    report: harness.Report, peaks: dict[str, list[int]], args: argparse.Namespace, bytes_each: int
) -> None:
    """Peaks divided by the first size's peak, with and without the gradient by the hidden states."""
    for name, peak in peaks.items():
        if len(peak) != len(args.sizes):
            continue
        flat = [p - n * args.hidden * bytes_each for p, n in zip(peak, args.sizes, strict=True)]
        for label, values in (("", peak), (", less the gradient by the hidden states", flat)):
            for tokens, value in list(zip(args.sizes, values, strict=True))[1:]:
                grown = harness.Ratio([value], [values[0]])
                first = harness.size_name(args.sizes[0])
                report.ratio(tokens, f"peak memory of {name} / its own at {first}{label}", grown)


if __name__ == "__main__":
    raise SystemExit(main())
