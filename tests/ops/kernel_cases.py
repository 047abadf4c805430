"""Our Triton kernels against their torch twins: outputs and gradients, on a GPU or interpreted.

TRITON_INTERPRET=1 python -m tests.ops.kernel_cases       # on a CPU, in Triton's interpreter
"""

from __future__ import annotations

import itertools

import torch

from megatron_hydra.model.rotary import rotary_tables
from megatron_hydra.ops import fusion_tail, qk_preparation, short_conv

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}


def compare(kernel, twin, tensors, dtype, what):
    """Same inputs (rounded to dtype; the twin then computes in fp64), fresh cotangent."""
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
        fa, gdn = (torch.randn(tokens, n, d, device=device) for n in (2, 3))
        gates = [torch.randn(tokens, n, d, device=device) for n in (2, 3)]
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
    """Gates arrive as columns of the fused projection."""
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


def check_chunk_loss(device, dtype, tokens=19, d=16, vocabulary=70):
    """Fused against unfused, both from hidden states; blocks smaller than the vocabulary."""
    from megatron_hydra.ops import triton_chunk_loss
    from megatron_hydra.ops.linear_distillation_loss import (
        linear_distillation_loss,
        linear_distillation_loss_reference,
    )

    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    mask = (torch.rand(tokens, device=device) < 0.7).float()
    whole_block = triton_chunk_loss.BLOCK
    for teacher, tau, block in itertools.product((False, True), (1.0, 2.5), (whole_block, 16)):
        triton_chunk_loss.BLOCK = block
        weights = [torch.randn(vocabulary, d, device=device) for _ in range(2)]
        hidden = [torch.randn(tokens, d, device=device) for _ in range(2)]
        options = {"kl_weight": 0.6 if teacher else 0.0, "temperature": tau}

        def arguments(x, teacher=teacher, weights=weights, hidden=hidden):
            given = (hidden[1].to(x[0]), weights[1].to(x[0])) if teacher else (None, None)
            return {
                "student_hidden": x[0], "student_weight": x[1], "labels": labels,
                "loss_mask": mask, "teacher_hidden": given[0], "teacher_weight": given[1],
            }  # fmt: skip

        low = [x.to(dtype).requires_grad_() for x in (hidden[0], weights[0])]
        hidden[1], weights[1] = hidden[1].to(dtype), weights[1].to(dtype)
        wide = [x.detach().double().requires_grad_() for x in low]
        got = linear_distillation_loss(**arguments(low), **options, chunk_tokens=8, fused=True)
        want = linear_distillation_loss_reference(**arguments(wide), **options)
        got_grads, want_grads = (
            torch.autograd.grad(got.loss, low),
            torch.autograd.grad(want.loss, wide),
        )
        pairs = [(got.loss, want.loss), (got.kl, want.kl), (got.ce, want.ce)]
        for i, (a, b) in enumerate([*pairs, *zip(got_grads, want_grads, strict=True)]):
            error = float((a.double() - b).norm() / b.norm().clamp_min(1e-9))
            assert error < TOLERANCE[dtype], f"{teacher=} {tau=}: tensor {i} is off by {error:.2e}"
    triton_chunk_loss.BLOCK = whole_block


CHECKS = (
    check_fusion_tail,
    check_strided_gate,
    check_prepare_heads,
    check_short_conv,
    check_chunk_loss,
)

if __name__ == "__main__":
    torch.manual_seed(0)
    for check in CHECKS:
        check(torch.device("cpu"), torch.float32)
        print(check.__name__)
