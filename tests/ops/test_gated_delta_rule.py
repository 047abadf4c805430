"""The chunked rule against its definition, FLA's naive recurrence and transformers' Qwen3-Next."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F

from megatron_hydra.ops import gated_delta_rule
from megatron_hydra.ops.gated_delta_rule import (
    chunked_gated_delta_rule,
    recurrent_gated_delta_rule,
)

PACKINGS = [(0, 70), (0, 64, 128), (0, 5, 133, 134, 200), (0, 1, 2, 3)]


RULES = ["gdn", "kda"]


def slow_inputs(
    length: int, heads: int = 3, d: int = 8, dtype=torch.float64, seed: int = 0, rule: str = "gdn"
):
    """q, k, v, log α, β with half-lives far longer than the sequence: fast decay would hide leaks."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(length, heads, d, generator=g, dtype=torch.float64) for _ in range(3))
    decays = (heads, d) if rule == "kda" else (heads,)
    log_alpha = -torch.rand(length, *decays, generator=g, dtype=torch.float64) * 1e-3
    beta = torch.rand(length, heads, generator=g, dtype=torch.float64)
    inputs = (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, log_alpha, beta)
    return [x.to(dtype).requires_grad_() for x in inputs]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cu", PACKINGS)
@pytest.mark.parametrize("chunk", [None, 16, 64])
def test_equals_the_recurrence_forward_and_backward(cu, chunk, rule):
    inputs = slow_inputs(cu[-1], rule=rule)
    initial = torch.randn(len(cu) - 1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    expected = recurrent_gated_delta_rule(*inputs, cu, initial)
    actual = chunked_gated_delta_rule(*inputs, cu, initial, chunk=chunk)
    cotangents = [torch.randn_like(x) for x in expected]
    expected_grads = torch.autograd.grad(expected, [*inputs, initial], cotangents)
    actual_grads = torch.autograd.grad(actual, [*inputs, initial], cotangents)
    for a, b in zip([*expected, *expected_grads], [*actual, *actual_grads], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cu", [(0, 200), (0, 5, 133, 134, 200)])
def test_groups_of_chunks_change_nothing(cu, rule, monkeypatch):
    inputs = slow_inputs(200, rule=rule)
    results = []
    for elements in (1 << 40, 1, 3000):
        monkeypatch.setattr(gated_delta_rule, "GROUP_ELEMENTS", elements)
        output, final = chunked_gated_delta_rule(*inputs, cu, chunk=16)
        gradients = torch.autograd.grad(
            (output.sum(), final.square().sum()), inputs, [torch.ones(()).double()] * 2
        )
        results.append([output, final, *gradients])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_fast_decay_does_not_overflow(rule):
    """Half of the channels or tokens decay by up to e^-30 a token (e^-1900 a chunk), the others slowly."""
    inputs = slow_inputs(130, rule=rule)
    with torch.no_grad():
        log_alpha = inputs[3].flatten()
        log_alpha[::2] *= 3e4
    results = []
    for function in (recurrent_gated_delta_rule, chunked_gated_delta_rule):
        output, state = function(*inputs)
        gradients = torch.autograd.grad(output.square().sum(), inputs)
        results.append([output, state, *gradients])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_low_precision_stays_near_float64(dtype, tolerance, rule):
    exact = slow_inputs(200, rule=rule)
    rounded = [x.detach().to(dtype) for x in exact]
    rounded[3:] = [x.detach().float() for x in exact[3:]]  # decay and β, as in the model
    exact = [x.double().requires_grad_() for x in rounded]
    rounded = [x.requires_grad_() for x in rounded]
    expected, _ = recurrent_gated_delta_rule(*exact)
    actual, state = chunked_gated_delta_rule(*rounded)
    assert actual.dtype == dtype
    assert state.dtype == torch.float32
    cotangent = torch.randn_like(actual)
    expected_grads = torch.autograd.grad(expected, exact, cotangent.double())
    actual_grads = torch.autograd.grad(actual, rounded, cotangent)
    assert [g.dtype for g in actual_grads] == [x.dtype for x in rounded]
    for a, b in zip([actual, *actual_grads], [expected, *expected_grads], strict=True):
        assert (a.double() - b).norm() / b.norm() < tolerance


def test_state_carries_a_stream_across_calls():
    inputs = slow_inputs(150)
    whole, final = chunked_gated_delta_rule(*inputs)
    first, state = chunked_gated_delta_rule(*(x[:77] for x in inputs))
    second, last = chunked_gated_delta_rule(*(x[77:] for x in inputs), initial_state=state)
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(last, final)


@pytest.mark.parametrize("rule", RULES)
def test_documents_are_isolated_bit_for_bit(rule):
    cu = (0, 37, 100, 164)
    inputs = [x.detach().float() for x in slow_inputs(164, rule=rule)]
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[36] = float("nan")  # the last token of the first document
    before, _ = chunked_gated_delta_rule(*inputs, cu)
    after, _ = chunked_gated_delta_rule(*changed, cu)
    assert torch.equal(before[37:], after[37:])
    assert not torch.equal(before[:37], after[:37])


def test_equals_fla_naive():
    fla = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    inputs = [x.detach().float() for x in slow_inputs(90)]
    q, k, v, log_alpha, beta = (x[None] for x in inputs)
    expected, state = fla.naive_recurrent_gated_delta_rule(
        q, k, v, beta, log_alpha, output_final_state=True
    )
    actual, final = chunked_gated_delta_rule(*inputs)
    torch.testing.assert_close(actual, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final[0], state[0], rtol=1e-5, atol=1e-6)


def test_decays_of_channels_equal_flas_naive_kda():
    fla = pytest.importorskip("fla.ops.kda.naive")
    inputs = [x.detach().float() for x in slow_inputs(90, rule="kda")]
    inputs[3] = inputs[3] * 300  # different in each channel
    expected, state = fla.naive_recurrent_kda(*(x[None] for x in inputs), output_final_state=True)
    actual, final = chunked_gated_delta_rule(*inputs)
    torch.testing.assert_close(actual, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final[0], state[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cu", PACKINGS)
def test_equal_decays_of_channels_are_the_decay_of_the_head(cu):
    """KDA then equals the gated delta rule: outputs, states and gradients (summed over a decay's channels)."""
    by_head = slow_inputs(cu[-1])
    by_channel = [x.detach().requires_grad_() for x in by_head]
    with torch.no_grad():
        by_channel[3] = by_head[3][..., None].expand(-1, -1, 8).clone()
    by_channel[3].requires_grad_()
    results = []
    for inputs in (by_head, by_channel):
        output, final = chunked_gated_delta_rule(*inputs, cu)
        total = (output * torch.arange(8)).sum() + final.square().sum()
        results.append([output, final, *torch.autograd.grad(total, inputs)])
    results[1][5] = results[1][5].sum(-1)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_equals_transformers_qwen3_next(monkeypatch):
    # If FLA can be imported, transformers takes its GPU kernels even without a GPU.
    name = "transformers.models.qwen3_next.modeling_qwen3_next"
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    inputs = [x.detach().float() for x in slow_inputs(150)]
    q, k, v, log_alpha, beta = (x[None] for x in inputs)
    expected, state = module.torch_chunk_gated_delta_rule(
        q, k, v, g=log_alpha, beta=beta, output_final_state=True
    )
    actual, final = chunked_gated_delta_rule(*inputs)
    torch.testing.assert_close(actual, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final[0], state[0], rtol=1e-5, atol=1e-6)
