"""The packed causal convolution against torch's, document by document."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_hydra.ops.short_conv import final_conv_state, short_conv
from megatron_hydra.parallel.packed_sequence import PackedSequence


def test_equals_conv1d_per_document_with_gradients():
    cu = (0, 2, 3, 20, 41)
    x = torch.randn(41, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.cat(
        [
            F.conv1d(F.pad(x[a:b].T[None], (3, 0)), weight[:, None], groups=6)[0].T
            for a, b in zip(cu, cu[1:], strict=False)
        ]
    )
    actual = short_conv(x, weight, PackedSequence(cu).positions_local)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(expected, [x, weight], cotangent),
        torch.autograd.grad(actual, [x, weight], cotangent),
        strict=True,
    ):
        torch.testing.assert_close(b, a)


def test_last_tap_alone_is_the_identity():
    weight = torch.zeros(5, 4)
    weight[:, -1] = 1
    x = torch.randn(9, 5)
    assert torch.equal(short_conv(x, weight, torch.arange(9)), x)


def test_state_carries_a_stream_across_calls_shorter_than_the_width():
    x, weight = torch.randn(11, 5), torch.randn(5, 4)
    whole = short_conv(x, weight, torch.arange(11))
    state, pieces = None, []
    for start, end in ((0, 2), (2, 3), (3, 11)):
        piece = x[start:end]
        pieces.append(short_conv(piece, weight, torch.arange(start, end), state))
        state = final_conv_state(piece, 4, state)
    torch.testing.assert_close(torch.cat(pieces), whole)


def test_gradients_flow_into_the_tokens_before_a_shard():
    """Gradients also reach only the first document's halo: earlier tokens have no part in this shard."""
    inputs = [torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (3, 8)]
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.cat((torch.arange(2, 6), torch.arange(4)))  # two tokens are before this shard
    cotangent = torch.randn(8, 5, dtype=torch.float64)
    actual = short_conv(inputs[1], weight, positions, inputs[0])
    whole = short_conv(
        torch.cat((inputs[0][1:], inputs[1])), weight, PackedSequence((0, 6, 10)).positions_local
    )
    torch.testing.assert_close(actual, whole[2:])
    got, want = (torch.autograd.grad(y, [*inputs, weight], cotangent) for y in (actual, whole[2:]))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert (got[0][0] == 0).all()
    assert (got[0][1:] != 0).all()


def test_bf16_gradients_stay_near_float64():
    positions = PackedSequence((0, 7, 40)).positions_local
    low = [torch.randn(*n).bfloat16().requires_grad_() for n in ((40, 6), (6, 4), (3, 6))]
    wide = [x.detach().double().requires_grad_() for x in low]
    got, want = (short_conv(x, w, positions + 2, halo) for x, w, halo in (low, wide))
    cotangent = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, low, cotangent)
    want_grads = torch.autograd.grad(want, wide, cotangent.double())
    for a, b in zip([got, *got_grads], [want, *want_grads], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_a_nan_stays_in_its_document():
    x, weight = torch.randn(10, 5), torch.randn(5, 4)
    positions = PackedSequence((0, 4, 10)).positions_local
    clean = short_conv(x, weight, positions)
    x[3] = float("nan")
    assert torch.equal(short_conv(x, weight, positions)[4:], clean[4:])
