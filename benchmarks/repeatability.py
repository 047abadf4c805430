#!/usr/bin/env python3
"""Whether equal runs give equal bits; if not, which kernel makes the difference.

It has three parts. ``kernels``: every kernel runs forward and backward several times on the same input.
``gradients``: the first training step's gradients several times in one process, for the chosen kernels, on one
stream and on two, and with each kernel's twin in turn. Every run is compared with the first of its kind, and
the first with the one on a single stream. ``runs``: several whole steps, twice from the start.

A difference is max |a − b| divided by max |a| of a tensor; a row has a parameter's largest over all layers.
Atomic additions differ between runs on any number of streams. A difference on two streams only is a race.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import os
import re
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks import _harness as harness
from benchmarks import _models as models
from benchmarks.step import build_train_state
from benchmarks.step_profile import packed_batches, profiled_config, training_steps
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import BackendConfig, RunConfig
from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.errors import command
from megatron_hydra.model.rotary import rotary_tables
from megatron_hydra.ops.backends import BACKENDS, choose_kernels
from megatron_hydra.ops.kernels import Case
from megatron_hydra.ops.linear_distillation_loss import linear_distillation_loss
from megatron_hydra.ops.rms_norm import weighted_rms_norm
from megatron_hydra.parallel.packed_sequence import PackedSequence
from megatron_hydra.parallel.world import start_world, stop_world
from megatron_hydra.training.step import TrainState, _accumulate_gradients
from megatron_hydra.transfer.verb import inner_model

EXAMPLE = "python -m benchmarks.repeatability --output repeatability"
Tensors = dict[str, torch.Tensor]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Max |a − b| divided by max |a|; 0 only for equal bits, infinite if one is not finite."""
    if torch.equal(a, b):
        return 0.0
    gap = (a.double() - b.double()).abs().max() / a.double().abs().max()
    return float(gap) if torch.isfinite(gap) else float("inf")


def kernel_cases(
    config: RunConfig, model: ModelConfig, packed: PackedSequence, device: torch.device, seed: int
) -> Iterator[tuple[str, Callable[[], Tensors]]]:
    """Pairs (kernel, function that runs it once on fixed inputs and returns results and gradients)."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    length, d, hidden = packed.length_local, model.head_dim, model.hidden_size

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        made = torch.randn(*shape, generator=generator, device=device) * scale
        return made.to(dtype).requires_grad_()

    def case(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], Tensors]:
        weight: list[torch.Tensor] = []

        def run() -> Tensors:
            output = function(*inputs)
            if not weight:
                weight.append(torch.randn(output.shape, generator=generator, device=device))
            wanted = [x for x in inputs if x.requires_grad]
            grads = torch.autograd.grad((output.float() * weight[0]).sum(), wanted)
            return {"output": output.detach()} | {
                f"gradient {i}": grad for i, grad in enumerate(grads)
            }

        return run

    heads, cu = model.num_query_heads, packed.local_cu_seqlens
    q, k, v = random(length, 2, d), random(length, 2, d), random(length, 2, d)
    names = [b.name for b in BACKENDS["full_attention"] if b.name != "torch"]
    where = Case(device, dtype, d)
    for name in names if device.type == "cuda" else ["torch"]:
        backend = BackendConfig(full_attention=name)  # type: ignore[arg-type]
        if device.type == "cuda" and next(
            b for b in BACKENDS["full_attention"] if b.name == name
        ).missing(where):
            continue
        attention = choose_kernels(backend, where, check=False).attention
        equal = tuple(range(0, length + 1, config.data.sequence_length))
        for label, bounds in (("equal", equal), ("packed", cu)):
            yield (
                f"attention {name}, {label} documents",
                case(lambda *x, f=attention, b=bounds: f(*x, b, b), q, k, v),
            )
    kernels = choose_kernels(BackendConfig(), where, check=False)
    unit = [F.normalize(random(length, heads, d).detach(), dim=-1).requires_grad_() for _ in "qk"]
    decay = (-torch.rand(length, heads, generator=generator, device=device)).requires_grad_()
    beta = torch.rand(length, heads, generator=generator, device=device).requires_grad_()
    yield (
        "gated delta rule",
        case(
            lambda *x: kernels.delta_rule(*x, cu)[0], *unit, random(length, heads, d), decay, beta
        ),
    )
    x, norm = random(length, heads, d), random(d)
    yield (
        "q/k preparation",
        case(
            lambda a, w: torch.cat(
                kernels.prepare_queries_and_keys(a, 1, (w, w), 1e-6, None, None, True), dim=1
            ),
            x,
            norm,
        ),
    )
    taps = random(3 * heads * d, 4)
    tables = rotary_tables(packed.positions_local, torch.ones(d // 2) / 100, 1.0)
    yield (
        "inputs of the delta rule",
        case(
            lambda a, w: torch.cat(
                kernels.delta_rule_inputs(
                    a, (heads, heads), w, packed.positions_local, None, (None, None), 1e-6, tables
                )
            ),
            random(length, 3 * heads * d), taps,
        ),
    )  # fmt: skip
    yield (
        "fusion tail",
        case(
            lambda a, g, s: kernels.fusion_tail([(a, g)], s, 1e-6),
            x, random(length, heads, d), random(heads),
        ),
    )  # fmt: skip
    index = torch.arange(heads, device=device) // 3
    yield (
        "index_select of shared heads",
        case(lambda a: a.index_select(1, index), random(length, 3, d)),
    )
    tokens = torch.randint(model.vocab_size, (length,), generator=generator, device=device)
    tokens = torch.where(tokens % 3 == 0, tokens % 50, tokens)  # some tokens are frequent
    table, weight = random(model.vocab_size, hidden), random(hidden)
    yield "embedding", case(lambda w: F.embedding(tokens, w), table)
    yield "embedding by indexing", case(lambda w: w[tokens], table)
    stream = random(length, 1, hidden)
    yield "norm", case(lambda a, w: weighted_rms_norm(a, w, 1e-6), stream, weight)
    head = random(model.vocab_size, hidden, scale=hidden**-0.5)
    teacher = random(length, hidden).detach()
    yield (
        "distillation loss",
        case(
            lambda a, w: linear_distillation_loss(
                a[:, 0], w, tokens, torch.ones_like(tokens), teacher_hidden=teacher,
                teacher_weight=head.detach(), kl_weight=0.9, chunk_tokens=config.loss.chunk_tokens,
            ).loss, stream, head,
        ),
    )  # fmt: skip
    mixing = random(hidden, hidden, scale=hidden**-0.5)
    yield "linear", case(F.linear, stream, mixing)


def gradients(train_state: TrainState, batch: PackedBatch) -> Tensors:
    """Loss sums and every parameter's gradient of a step, without the update."""
    _accumulate_gradients(train_state, [batch])
    found = {"loss": train_state.verb.sums.clone()}
    for chunk in train_state.chunks:
        for name, parameter in inner_model(chunk).named_parameters():
            if parameter.requires_grad:
                found[name] = parameter.main_grad.clone()
    return found


def compared(first: Tensors, other: Tensors) -> tuple[str, float, int]:
    """A line with the differences by kind, the largest difference, and the number of tensors that differ."""
    by_kind: dict[str, list[float]] = {}
    for name, tensor in first.items():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        by_kind.setdefault(kind, []).append(difference(tensor, other[name]))
    worst = {kind: max(values) for kind, values in by_kind.items() if max(values)}
    number = sum(value > 0 for values in by_kind.values() for value in values)
    kinds = ", ".join(
        f"{kind.removeprefix('decoder.layers.*.')} {value:.1e} ({sum(v > 0 for v in by_kind[kind])} of "
        f"{len(by_kind[kind])})"
        for kind, value in sorted(worst.items(), key=lambda pair: -pair[1])
    )
    return kinds or "nothing", max(worst.values(), default=0.0), number


def norm_of(tensors: Tensors) -> float:
    """Norm of all gradients."""
    return float(sum(x.double().square().sum() for n, x in tensors.items() if n != "loss") ** 0.5)


def variants(args: argparse.Namespace, twins: bool) -> Iterator[tuple[str, BackendConfig]]:
    """Pairs (name, back ends); the others are compared with the first one."""
    auto, on_gpu = BackendConfig(), torch.cuda.is_available()
    yield "one stream", dataclasses.replace(auto, streams="one")
    if on_gpu:
        yield "two streams", dataclasses.replace(auto, streams="two")
    if not twins:
        return
    for key, values in (
        ("full_attention", ("torch", "varlen") if on_gpu else ("torch",)),
        ("gated_delta_net", ("torch",)),
        ("fused_kernels", ("torch",)),
    ):
        for value in values:
            backend = dataclasses.replace(auto, streams="one", **{key: value})  # type: ignore[arg-type]
            yield f"one stream, {key} {value}", backend


def _ready(
    args: argparse.Namespace, verb: str, backend: BackendConfig,
    shape: ModelConfig, student: ModelConfig, device: torch.device,
) -> tuple[TrainState, list[PackedBatch]]:  # fmt: skip
    config = dataclasses.replace(
        profiled_config(args, verb, device), backend=backend, deterministic=args.deterministic
    )
    world = start_world(config)
    train_state = build_train_state(student, shape, config, world)
    batches = packed_batches(config, shape.vocab_size, args.equal, args.seed)
    return train_state, list(itertools.islice(batches, args.steps))


def _clear(device: torch.device) -> None:
    stop_world()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def kernels_part(report: harness.Report, args: argparse.Namespace, shape: ModelConfig) -> None:
    """Run every kernel several times on the same input."""
    device = report.device
    config = profiled_config(args, "distill", device)
    batch = next(packed_batches(config, shape.vocab_size, False, args.seed))
    packed = PackedSequence(batch.cu_seqlens, device=device)
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
    for name, run in kernel_cases(config, shape, packed, device, args.seed):
        try:
            first = run()
            gaps: dict[str, float] = dict.fromkeys(first, 0.0)
            for _ in range(args.repeats - 1):
                for key, tensor in run().items():
                    gaps[key] = max(gaps[key], difference(first[key], tensor))
        except RuntimeError as error:
            report.note(f"kernel {name}: refused: {str(error).splitlines()[0][:150]}")
            continue
        differs = ", ".join(f"{key} {gap:.1e}" for key, gap in gaps.items() if gap)
        report.note(f"kernel {name}, {args.repeats} times: {differs or 'equal bits'}")


def gradients_part(
    report: harness.Report, args: argparse.Namespace, verb: str, shape: ModelConfig,
    student: ModelConfig,
) -> None:  # fmt: skip
    """The first step's gradients, several times."""
    device, reference = report.device, None
    for name, backend in variants(args, args.twins):
        first = other = train_state = None
        try:
            train_state, batches = _ready(args, verb, backend, shape, student, device)
            first = gradients(train_state, batches[0])
            report.note(
                f"{verb}, {name}: loss sums {first['loss'].sum().item():.9e}, gradient norm "
                f"{norm_of(first):.9e}"
            )
            for repeat in range(1, args.repeats):
                other = gradients(train_state, batches[0])
                text, _, number = compared(first, other)
                report.note(f"  again ({repeat}): {number} of {len(first)} tensors differ: {text}")
            if reference is None:
                reference = {key: tensor.cpu() for key, tensor in first.items()}
            else:
                text, worst, number = compared(reference, {k: v.cpu() for k, v in first.items()})
                report.note(f"  against one stream: {number} differ, at most {worst:.1e}: {text}")
        except (RuntimeError, ValueError) as error:
            report.note(
                f"{verb}, {name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            )
        first = other = train_state = None
        _clear(device)


def runs_part(
    report: harness.Report, args: argparse.Namespace, verb: str, shape: ModelConfig,
    student: ModelConfig,
) -> None:  # fmt: skip
    """Whole steps, twice from the start."""
    device = report.device
    for name, backend in variants(args, False):
        results: list[list[tuple[float, float]]] = []
        try:
            for _ in range(2):
                train_state, batches = _ready(args, verb, backend, shape, student, device)
                results.append(
                    [(r.loss, r.grad_norm) for _, r in training_steps(train_state, iter(batches))]
                )
                train_state = None  # type: ignore[assignment]
                _clear(device)
        except (RuntimeError, ValueError) as error:
            report.note(
                f"{verb}, {name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            )
            _clear(device)
            continue
        gaps = [
            f"{abs(a - b) / abs(a):.1e}/{abs(m - n) / abs(m):.1e}"
            for (a, m), (b, n) in zip(*results, strict=True)
        ]
        report.note(f"{verb}, {name}, steps twice, loss/gradient norm differ by {' '.join(gaps)}")


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE)
    parser.add_argument("--parts", default="kernels,gradients,runs", help="default: all three")
    parser.add_argument("--verbs", default="align,distill", help="comma-separated (default both)")
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="of a sequence (default 512)")
    parser.add_argument("--chunk", type=int, default=4096, help="loss.chunk_tokens")
    parser.add_argument("--equal", action="store_true", help="every document fills its sequence")
    parser.add_argument("--layers", type=int, help="fewer layers than the model's 30")
    parser.add_argument("--steps", type=int, default=8, help="of each run (default 8)")
    parser.add_argument("--deterministic", action="store_true",
                        help="runs with deterministic: true")  # fmt: skip
    parser.add_argument("--twins", action="store_true", help="gradients with each twin as well")
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to try the script out")
    parser.set_defaults(repeats=4, streams="auto")
    args = parser.parse_args(arguments)
    device = harness.chosen_device(args)
    if args.deterministic:  # torch needs it before the first product of a process
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    shape = models.TINY if args.tiny else models.SMOLLM2_135M
    student = models.hybrid_at_ratio(shape)
    if args.layers:
        shape, student = models.smaller(shape, args.layers), models.smaller(student, args.layers)
    report = harness.Report("repeatability", args, device)
    parts = args.parts.split(",")
    if "kernels" in parts:
        kernels_part(report, args, shape)
    for verb in args.verbs.split(","):
        if "gradients" in parts:
            gradients_part(report, args, verb, shape, student)
        if "runs" in parts:
            runs_part(report, args, verb, shape, student)
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
