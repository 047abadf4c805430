"""Our Triton kernels against their torch twins: outputs and gradients, on a GPU or interpreted.

TRITON_INTERPRET=1 python -m tests.ops.kernel_cases           # on a CPU, in Triton's interpreter
TRITON_INTERPRET=1 python -m tests.ops.kernel_cases --slow    # cases that are slow in it
"""

from __future__ import annotations

import itertools
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch

from megatron_hydra.model.rotary import rotary_tables
from megatron_hydra.ops import (
    delta_rule_gates,
    delta_rule_inputs,
    fusion_tail,
    qk_preparation,
    short_conv,
)
from megatron_hydra.ops.linear_distillation_loss import (
    linear_distillation_loss,
    linear_distillation_loss_reference,
)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}


def compare(kernel, twin, tensors, dtype, what):
    """Compare on the same inputs (rounded to dtype; the twin computes in fp64) with a random cotangent."""
    low = [x.to(dtype).detach().requires_grad_() for x in tensors]
    wide = [x.detach().double().requires_grad_() for x in low]
    got, want = kernel(low), twin(wide)
    assert got.shape == want.shape
    assert got.dtype == dtype
    cotangent = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, low, cotangent)
    want_grads = torch.autograd.grad(want, wide, cotangent.double())
    pairs = [(got, want), *zip(got_grads, want_grads, strict=True)]
    for i, (a, b) in enumerate(pairs):
        error = float((a.double() - b).norm() / b.norm())
        assert error < TOLERANCE[dtype], f"{what}: tensor {i} is off by {error:.2e}"


def check_fusion_tail(device, dtype, d=32, tokens=37):
    from megatron_hydra.ops import triton_fusion_tail

    combinations = itertools.product((False, True), (None, "head", "token"), (None, 1e-6))
    for gated, scaled, eps in combinations:
        fa, gdn = (torch.randn(tokens, n, d, device=device) for n in (1, 4))
        gates = [torch.randn(tokens, n, d, device=device) for n in (1, 4)]
        scale = {None: [], "head": [5], "token": [tokens, 5]}[scaled]
        tensors = [
            fa,
            gdn,
            *(gates if gated else []),
            *([torch.rand(scale, device=device)] * bool(scale)),
        ]

        def call(function, x, gated=gated, scale=scale, eps=eps):
            branches = [(x[0], x[2]), (x[1], x[3])] if gated else [(x[0], None), (x[1], None)]
            return function(branches, x[-1] if scale else None, eps)

        compare(
            lambda x, call=call: call(triton_fusion_tail.fusion_tail, x),
            lambda x, call=call: call(fusion_tail.fusion_tail, x),
            tensors, dtype, f"fusion tail {gated=} {scaled=} {eps=}",
        )  # fmt: skip


def check_strided_gate(device, dtype):
    """Gates are columns of the fused projection."""
    from megatron_hydra.ops import triton_fusion_tail

    def call(function, x):
        gate = x[1][:, 7 * 32 : 10 * 32].unflatten(-1, (3, 32))
        return function([(x[0], gate)], None, 1e-6)

    compare(
        lambda x: call(triton_fusion_tail.fusion_tail, x),
        lambda x: call(fusion_tail.fusion_tail, x),
        [torch.randn(19, 3, 32, device=device), torch.randn(19, 11 * 32, device=device)],
        dtype, "strided gate",
    )  # fmt: skip


def check_prepare_heads(device, dtype, d=48, tokens=21):
    from megatron_hydra.ops import triton_qk_preparation

    positions = torch.cat((torch.arange(9), torch.arange(12))).to(device)
    frequencies = 1.0 / 10000 ** (torch.arange(0, d, 2).float() / d)
    cos, sin = rotary_tables(positions, frequencies, 1.0)
    scales = 1 + torch.rand(tokens, device=device)
    options = itertools.product(*[(False, True)] * 4)
    for norm, rotary, scaled, l2 in options:
        if not (norm or rotary or scaled or l2):
            continue
        tables, scale = (cos, sin) if rotary else None, scales if scaled else None
        projected = torch.randn(tokens, 5 * d, device=device)  # heads are columns of it
        tensors = [projected, *([1 + torch.rand(d, device=device)] if norm else [])]

        def call(function, x, tables=tables, scale=scale, l2=l2):
            heads = x[0][:, d : 4 * d].unflatten(-1, (3, d))
            return function(heads, x[1] if len(x) > 1 else None, 1e-6, tables, scale, l2)

        compare(
            lambda x, call=call: call(triton_qk_preparation.prepare_heads, x),
            lambda x, call=call: call(qk_preparation.prepare_heads, x),
            tensors, dtype, f"q/k preparation {norm=} {rotary=} {scaled=} {l2=}",
        )  # fmt: skip

    for norm, rotary, scaled in itertools.product(*[(False, True)] * 3):
        tables, scale = (cos, sin) if rotary else None, scales if scaled else None
        norms = (1 + torch.rand(2, d, device=device)).unbind() if norm else ()

        def pair(function, x, tables=tables, scale=scale):
            heads = x[0][:, d : 4 * d].unflatten(-1, (3, d))
            norms = (x[1], x[2]) if len(x) > 1 else (None, None)
            q, k = function(heads, 1, norms, 1e-6, tables, scale, False)
            return torch.cat((q, k), dim=1)

        compare(
            lambda x, pair=pair: pair(triton_qk_preparation.prepare_queries_and_keys, x),
            lambda x, pair=pair: pair(qk_preparation.prepare_queries_and_keys, x),
            [projected, *norms], dtype, f"queries and keys {norm=} {rotary=} {scaled=}",
        )  # fmt: skip


def check_short_conv(device, dtype, channels=40, tokens=150):
    from megatron_hydra.ops import triton_short_conv

    for width, with_halo in ((4, False), (4, True), (3, True), (1, False)):
        first = 2 if with_halo else 0  # the first fragment began two tokens before the shard
        lengths = (5, 1, 2, tokens - 8)
        positions = [torch.arange(n) + (first if i == 0 else 0) for i, n in enumerate(lengths)]
        positions = torch.cat(positions).to(device)
        tensors = [torch.randn(tokens, 2 * channels, device=device), torch.randn(channels, width)]
        tensors[1] = tensors[1].to(device)
        if with_halo:
            tensors.append(torch.randn(width - 1, channels, device=device))

        def call(function, x, positions=positions):
            return function(
                x[0][:, channels // 2 : channels // 2 + channels], x[1], positions, *x[2:]
            )

        compare(
            lambda x, call=call: call(triton_short_conv.short_conv, x),
            lambda x, call=call: call(short_conv.short_conv, x),
            tensors, dtype, f"short convolution {width=} {with_halo=}",
        )  # fmt: skip


def check_delta_rule_gates(device, dtype, tokens=150):
    """Logits are columns of the projection. Rates are from far below the rounding of 1 to several a token."""
    from megatron_hydra.ops import triton_delta_rule_gates

    for heads in (1, 5, 14):

        def call(function, x, heads=heads):
            a, b = x[0][:, 1 : 1 + heads], x[0][:, 2 + heads : 2 + 2 * heads]
            log_alpha, beta = function(a, b, x[1], x[2])
            # every decay has the same weight, however slow it is
            return torch.cat((log_alpha / (1e-6 - log_alpha.detach()), beta), dim=1).to(x[0].dtype)

        tensors = [
            torch.randn(tokens, 2 * heads + 5, device=device),
            torch.rand(heads, device=device),
            torch.rand(heads, device=device) * 12 - 9,
        ]
        compare(
            lambda x, call=call: call(triton_delta_rule_gates.delta_rule_gates, x),
            lambda x, call=call: call(delta_rule_gates.delta_rule_gates, x),
            tensors, dtype, f"gates of the delta rule {heads=}",
        )  # fmt: skip


def check_delta_rule_inputs(device, dtype, d=16, tokens=40):
    from megatron_hydra.ops import triton_delta_rule_inputs

    lengths = (5, 1, 2, tokens - 8)
    frequencies = 1.0 / 100 ** (torch.arange(0, d, 2).float() / d)
    # n + m heads of 16 channels end within a block of channels, or at its end
    cases = [
        ((3, 2), False, False, 4), ((3, 2), True, True, 4), ((3, 2), True, False, None),
        ((3, 1), True, False, 4), ((3, 1), False, False, None),  # no rotary
        ((4, 4), True, False, 4), ((4, 4), False, True, 4), ((1, 1), True, False, 4),
    ]  # fmt: skip
    for (n, m), with_norms, with_halo, width in cases:
        first = 2 if with_halo else 0
        positions = [torch.arange(n) + (first if i == 0 else 0) for i, n in enumerate(lengths)]
        positions = torch.cat(positions).to(device)
        tables = None if m == 1 < n else rotary_tables(positions, frequencies, 1.0)
        channels = (n + 2 * m) * d
        tensors = [torch.randn(tokens, channels + 24, device=device)]  # columns of the projection
        if width is not None:
            tensors.append(torch.randn(channels, width, device=device))
        tensors += [torch.randn(3, channels, device=device)] * with_halo
        tensors += [1 + torch.rand(d, device=device) for _ in range(2 * with_norms)]

        def call(
            function, x, heads=(n, m), positions=positions, tables=tables, width=width,
            with_halo=with_halo, with_norms=with_norms,
        ):  # fmt: skip
            qkv, *rest = x
            conv = rest.pop(0) if width else None
            halo = rest.pop(0) if with_halo else None
            norms = tuple(rest) if with_norms else (None, None)
            made = function(
                qkv[:, 8 : 8 + (heads[0] + 2 * heads[1]) * d], heads, conv, positions, halo, norms,
                1e-6, tables,
            )  # fmt: skip
            return torch.cat(made, dim=1)

        compare(
            lambda x, call=call: call(triton_delta_rule_inputs.delta_rule_inputs, x),
            lambda x, call=call: call(delta_rule_inputs.delta_rule_inputs, x),
            tensors, dtype, f"inputs of the delta rule {n=} {m=} {with_norms=} {with_halo=} {width=}",
        )  # fmt: skip


def check_squared_error(device, dtype, tokens=37):
    from megatron_hydra.ops import triton_squared_error
    from megatron_hydra.ops.squared_error import squared_error

    mask = torch.rand(tokens, device=device) < 0.7
    for channels, block in ((40, 1024), (40, 16), (48, 16)):
        output, target = (torch.randn(tokens, 60, device=device).to(dtype) for _ in range(2))
        output[~mask] = float("nan")
        x = output[:, 8 : 8 + channels]
        with mock.patch.object(triton_squared_error, "MAX_BLOCK", block):
            rows, slope = triton_squared_error.squared_error(x, target[:, :channels], mask)
        wide = x.double(), target[:, :channels].double()
        total, gradient = squared_error(*wide, mask, fused=False)
        of_tokens = torch.where(mask, (wide[0] - wide[1]).square().mean(-1), 0)
        assert rows.dtype == torch.float32
        assert slope.dtype == dtype
        for a, b in ((rows, of_tokens), (rows.sum(), total), (slope, gradient)):
            error = float((a.double() - b).norm() / b.norm())
            assert error < TOLERANCE[dtype], f"squared error {channels=} {block=}: {error:.2e}"


def check_one_head(device, dtype, d=128, tokens=21):
    """The compiler makes every count of 1 a constant; d is that of real models."""
    from megatron_hydra.ops import triton_fusion_tail, triton_qk_preparation

    cos, sin = rotary_tables(torch.arange(tokens, device=device), torch.rand(d // 2), 1.0)
    x, gate = (torch.randn(tokens, 1, d, device=device) for _ in range(2))
    weight, scale = 1 + torch.rand(d, device=device), torch.rand(1, device=device)
    compare(
        lambda x: triton_qk_preparation.prepare_heads(*x, 1e-6, (cos, sin), None, True),
        lambda x: qk_preparation.prepare_heads(*x, 1e-6, (cos, sin), None, True),
        [x, weight], dtype, "q/k preparation of one head",
    )  # fmt: skip
    compare(
        lambda x: triton_fusion_tail.fusion_tail([x[:2]], x[2], 1e-6),
        lambda x: fusion_tail.fusion_tail([x[:2]], x[2], 1e-6),
        [x, gate, scale], dtype, "fusion tail of one head",
    )  # fmt: skip


class LossCase:
    """Hidden states, LM heads and labels in ``dtype``, and the expected loss and gradients."""

    def __init__(self, device, dtype, teacher, tau, tokens=19, d=16, vocabulary=70):
        self.options = {"kl_weight": 0.6 if teacher else 0.0, "temperature": tau}
        self.labels = torch.randint(0, vocabulary, (tokens,), device=device)
        self.mask = (torch.rand(tokens, device=device) < 0.7).float()
        self.hidden, self.teacher_hidden = (
            torch.randn(tokens, d, device=device).to(dtype) for _ in range(2)
        )
        self.weight, self.teacher_weight = (
            torch.randn(vocabulary, d, device=device).to(dtype) for _ in range(2)
        )
        self.what, self.tolerance, self.has_teacher = (
            f"{teacher=} {tau=}",
            TOLERANCE[dtype],
            teacher,
        )
        self.want = self.call(linear_distillation_loss_reference, torch.float64, slice(None))

    def call(self, function, dtype, rows, **options):
        """Loss, KL, CE, and gradients by hidden states and by these rows of the LM head."""
        inputs = [x.to(dtype).detach().requires_grad_() for x in (self.hidden, self.weight[rows])]
        if self.has_teacher:
            options["teacher_hidden"] = self.teacher_hidden.to(dtype)
            options["teacher_weight"] = self.teacher_weight[rows].to(dtype)
        loss = function(*inputs, self.labels, self.mask, **self.options, **options)
        return [*loss, *torch.autograd.grad(loss.loss, inputs)]

    def compare(self, got):
        for i, (a, b) in enumerate(zip(got, self.want, strict=True)):
            error = float((a.double() - b).norm() / b.norm().clamp_min(1e-9))
            assert error < self.tolerance, f"{self.what}: tensor {i} is off by {error:.2e}"


def check_chunk_loss(device, dtype):
    """From hidden states, also with blocks smaller than the vocabulary."""
    from megatron_hydra.ops import triton_chunk_loss

    blocks = triton_chunk_loss.BLOCK, 16
    for teacher, tau, block in itertools.product((False, True), (1.0, 2.5), blocks):
        case = LossCase(device, dtype, teacher, tau)
        with mock.patch.object(triton_chunk_loss, "BLOCK", block):
            case.compare(
                case.call(linear_distillation_loss, dtype, slice(None), chunk_tokens=8, fused=True)
            )


def check_rounded_logits(device, dtype):
    """Logits in the weights' dtype compared with logits in fp32, by the same kernels."""
    case = LossCase(device, dtype, True, 2.5)
    inputs = [case.hidden * 0.25, case.weight]
    results = []
    for fp32_logits in (True, False):
        low = [x.detach().requires_grad_() for x in inputs]
        loss = linear_distillation_loss(
            *low, case.labels, case.mask, teacher_hidden=case.teacher_hidden * 0.25,
            teacher_weight=case.teacher_weight, chunk_tokens=8, fused=True, fp32_logits=fp32_logits,
            **case.options,
        ).loss  # fmt: skip
        results.append([loss, *torch.autograd.grad(loss, low)])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        error = float((a.detach().float() - b.detach().float()).norm() / a.detach().float().norm())
        assert error < TOLERANCE[dtype], f"rounded logits: tensor {i} is off by {error:.2e}"


class Ranks:
    """A process group whose ranks are threads that take turns: Triton's interpreter runs one at a time."""

    def __init__(self, size):
        self.size = size
        self.met = threading.Barrier(size, timeout=240)
        self.turn = threading.Lock()
        self.given = [None] * size

    def group(self, rank):
        """The object that one rank passes as its process group."""
        return types.SimpleNamespace(rank=lambda: rank, size=lambda: self.size)

    def all_reduce(self, x, op, group):
        self.given[group.rank()] = x.clone()
        self.turn.release()
        self.met.wait()
        given = torch.stack(self.given)
        self.met.wait()  # no rank writes again before all have read
        self.turn.acquire()
        x.copy_(given.amax(0) if op == torch.distributed.ReduceOp.MAX else given.sum(0))

    def run(self, function):
        """Call ``function(rank)`` as every rank; returns the results in order."""

        def one(rank):
            with self.turn:
                return function(rank)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))


def check_vocabulary_parallel_loss(device, dtype, size=2):
    """Each rank has half of the vocabulary: both have the same loss, and gradients add up and join."""
    for teacher, tau in itertools.product((False, True), (1.0, 2.5)):
        case, ranks = LossCase(device, dtype, teacher, tau), Ranks(size)
        part = len(case.weight) // size

        def on_rank(rank, case=case, ranks=ranks, part=part):
            return case.call(
                linear_distillation_loss, dtype, slice(rank * part, (rank + 1) * part),
                chunk_tokens=8, fused=True, tp_group=ranks.group(rank),
            )  # fmt: skip

        with mock.patch("torch.distributed.all_reduce", ranks.all_reduce):
            results = ranks.run(on_rank)
        d_hidden = sum(result[3].double() for result in results)
        d_weight = torch.cat([result[4] for result in results])
        for result in results:
            case.compare([*result[:3], d_hidden, d_weight])


def check_start_up(device, dtype):
    """The start-up check passes our kernels, at the head dimension of real models."""
    from megatron_hydra.ops.backends import BACKENDS
    from megatron_hydra.ops.kernels import Case, Kernels
    from megatron_hydra.ops.self_check import check_kernels

    (triton,) = (b for b in BACKENDS["fused_kernels"] if b.name == "triton")
    names = {**Kernels().names, "fused_kernels": "triton"}
    check_kernels(Kernels(**triton.load(), names=names), Case(device, dtype, 128))


CHECKS = (
    check_fusion_tail,
    check_strided_gate,
    check_prepare_heads,
    check_short_conv,
    check_delta_rule_gates,
    check_delta_rule_inputs,
    check_squared_error,
    check_one_head,
    check_chunk_loss,
    check_rounded_logits,
    check_vocabulary_parallel_loss,
    check_start_up,
)
SLOW = (check_start_up,)
"""Cases that are slow in the interpreter."""

if __name__ == "__main__":
    torch.manual_seed(0)
    for check in CHECKS:
        if (check in SLOW) == ("--slow" in sys.argv):
            check(torch.device("cpu"), torch.float32)
            print(check.__name__, flush=True)
