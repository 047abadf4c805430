"""The start-up check: it checks right kernels once and refuses wrong ones."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.ops import fla_tuning, self_check
from megatron_hydra.ops.kernels import Case, Kernels
from megatron_hydra.ops.linear_distillation_loss import linear_distillation_loss
from megatron_hydra.ops.linear_rules import KIMI_DELTA_ATTENTION
from megatron_hydra.ops.self_check import (
    BOUNDARIES,
    TOLERANCE,
    _delta_rule_checks,
    all_checks,
    call_delta_rules,
    check_kernels,
)
from megatron_hydra.ops.sharded_delta_rule import (
    RuleKernels,
    sharded_gated_delta_rule,
    shards_of,
)

CPU = torch.device("cpu")
CASE = Case(CPU, torch.float32, 16, windowed=True)
TWINS = Kernels()


@pytest.fixture(autouse=True)
def _nothing_passed_yet(monkeypatch):
    monkeypatch.setattr(self_check, "_passed", set())


def named(key, name, **kernels):
    """The twins, with ``kernels`` replaced and another name for one key."""
    return dataclasses.replace(TWINS, **kernels, names={**TWINS.names, key: name})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twins_pass_every_check(dtype):
    """So inputs, calls and tolerances are valid; in bf16 the reference is the twin in fp32."""
    case, keys = dataclasses.replace(CASE, dtype=dtype), set()
    of_kda = _delta_rule_checks(dataclasses.replace(case, rule=KIMI_DELTA_ATTENTION))
    for key, what, inputs, run in (*all_checks(case), *of_kda):
        assert self_check._difference(TWINS, TWINS, inputs, run, TOLERANCE[dtype]) is None, what
        keys.add(key)
    assert keys == set(TWINS.names)


def first_keys_attention(q, k, v, cu_q, cu_k, window=None):
    """A wrong kernel that aligns a document's queries with its first keys."""
    rows = [torch.arange(c, c + b - a) for a, b, c in zip(cu_q, cu_q[1:], cu_k[:-1], strict=False)]
    return TWINS.attention(q, k[torch.cat(rows)], v[torch.cat(rows)], cu_q, cu_q, window)


def wider_window(*args, window=None):
    return TWINS.attention(*args, window=None if window is None else window + 5)


def leaking_delta_rule(q, k, v, log_alpha, beta, cu):
    return TWINS.delta_rule(q, k, v, log_alpha, beta, (0, q.shape[0]))


def equal_channels(q, k, v, log_alpha, beta, cu, exchange=None):
    assert exchange is None  # FLA itself computes this rule's shards, over real ranks
    mean = log_alpha.mean(-1, keepdim=True).expand_as(log_alpha)
    return TWINS.delta_rule(q, k, v, mean, beta, cu)


def without_scale(x, key_heads, norms, eps, tables, scale, l2):
    return TWINS.prepare_queries_and_keys(x, key_heads, norms, eps, tables, None, l2)


def without_rotary(x, key_heads, norms, eps, tables, scale, l2):
    return TWINS.prepare_queries_and_keys(x, key_heads, norms, eps, None, scale, l2)


def with_scaled_keys(x, key_heads, norms, eps, tables, scale, l2):
    q, k = TWINS.prepare_queries_and_keys(x, key_heads, norms, eps, tables, scale, l2)
    return q, k if scale is None else k * scale[:, None, None]


def without_halo(qkv, heads, conv, positions, halo, *rest):
    return TWINS.delta_rule_inputs(
        qkv, heads, conv, positions, None if halo is None else 0 * halo, *rest
    )


def forgetful_gates(a, b, a_log, dt_bias):
    log_alpha, beta = TWINS.delta_rule_gates(a, b, a_log, dt_bias)
    return (1 + log_alpha.exp() - 1).log() * 1.1, beta


def with_one_norm(qkv, heads, conv, positions, halo, norms, *rest):
    return TWINS.delta_rule_inputs(qkv, heads, conv, positions, halo, (norms[0],) * 2, *rest)


def without_gate(branches, scale, eps):
    return TWINS.fusion_tail([(o, 0 * gate) for o, gate in branches], scale, eps)


PAIR = "prepare_queries_and_keys"


@pytest.mark.parametrize(
    ("key", "kernel", "wrong", "what"),
    [
        ("full_attention", "attention", first_keys_attention, "the documents' last queries"),
        ("full_attention", "attention", wider_window, "within a window"),
        ("gated_delta_net", "delta_rule", leaking_delta_rule, "packed gated delta rule"),
        ("fused_kernels", PAIR, without_scale, "q/k preparation with the log scale"),
        ("fused_kernels", PAIR, with_scaled_keys, "q/k preparation with the log scale"),
        ("fused_kernels", PAIR, without_rotary, "q/k preparation with rotary"),
        ("fused_kernels", "delta_rule_gates", forgetful_gates, "the gates of the delta rule"),
        ("fused_kernels", "delta_rule_inputs", without_halo, "delta rule after another shard"),
        ("fused_kernels", "delta_rule_inputs", with_one_norm, "inputs of the delta rule"),
        ("fused_kernels", "fusion_tail", without_gate, "the fusion tail"),
    ],
)
def test_a_wrong_kernel_is_refused_by_name(key, kernel, wrong, what):
    kernels = named(key, "mine", **{kernel: wrong})
    with pytest.raises(HydraError, match=rf"check of .*{what}.* failed with backend\.{key}=mine"):
        check_kernels(kernels, CASE)


def test_shards_are_checked_where_ranks_share_a_sequence(monkeypatch):
    """All shards are in this process; the check finds a state that is not passed on."""
    rule = RuleKernels(TWINS.delta_rule)

    def sharded(*x, exchange):
        return sharded_gated_delta_rule(rule, x[:5], exchange), None

    def forgetful(*x, exchange):
        monkeypatch.setattr(type(exchange), "enter", lambda self, maps, like: ([None] * 3, None))
        return sharded(*x, exchange=exchange)

    # Short streams: how kernels cut parts does not matter here.
    streams = {name: (BOUNDARIES, *rest) for name, (_, *rest) in self_check.SHARDED.items()}
    monkeypatch.setattr(self_check, "SHARDED", streams)
    case = dataclasses.replace(CASE, context_parallel=True)
    check_kernels(named("gated_delta_net", "mine", delta_rule=sharded), case)
    with pytest.raises(HydraError, match=r"over shards failed with backend\.gated_delta_net=wrong"):
        check_kernels(named("gated_delta_net", "wrong", delta_rule=forgetful), case)


def test_streams_of_shards_are_such_that_errors_show():
    through = set()
    for cu, decay, strength in self_check.SHARDED.values():
        first, middle, last = shards_of(cu, self_check.SHARDS)
        assert first.goes_on and last.begun
        if middle.through:  # the state that leaves the first shard reaches the last one
            through.add(0.5 * decay * (middle.end - middle.start) > -2)
            assert 0.5 * strength * (middle.end - middle.start) < 64
    assert through == {True}


@pytest.mark.parametrize("shards", [False, True])
def test_a_kernel_of_another_rule_is_refused(shards, monkeypatch):
    streams = {name: (BOUNDARIES, *rest) for name, (_, *rest) in self_check.SHARDED.items()}
    monkeypatch.setattr(self_check, "SHARDED", streams)
    kernels = named("gated_delta_net", "mine", delta_rule=equal_channels)
    case = dataclasses.replace(CASE, rule=KIMI_DELTA_ATTENTION, context_parallel=shards)
    with pytest.raises(HydraError, match=r"check of packed Kimi delta attention of 2 heads"):
        check_kernels(kernels, case)


@pytest.mark.parametrize("what", ["cross-entropy", "distillation loss", "at a temperature"])
def test_a_wrong_fused_loss_is_refused(monkeypatch, what):
    def loss(*args, fused, **kwargs):
        right = linear_distillation_loss(*args, fused=False, **kwargs)
        name = "cross-entropy"
        if "kl_weight" in kwargs:
            name = "at a temperature" if "temperature" in kwargs else "distillation loss"
        return right._replace(loss=right.loss * 1.1) if fused and name == what else right

    monkeypatch.setattr(self_check, "linear_distillation_loss", loss)
    with pytest.raises(HydraError, match=f"{what} failed with backend.fused_kernels=triton"):
        check_kernels(named("fused_kernels", "triton"), CASE)


def test_a_choice_is_checked_once(monkeypatch):
    calls = []

    def attention(*args, **kwargs):
        calls.append(args)
        return TWINS.attention(*args, **kwargs)

    check_kernels(named("full_attention", "mine", attention=attention), CASE)
    first = len(calls)
    assert first > 0
    # A second model of the same run; its kernels may be other closures.
    again = named("full_attention", "mine", attention=functools.partial(attention))
    check_kernels(again, CASE)
    assert len(calls) == first
    check_kernels(again, dataclasses.replace(CASE, head_dim=8))
    assert len(calls) == 2 * first


def test_what_failed_is_checked_again():
    kernels = named("fused_kernels", "mine", fusion_tail=without_gate)
    for _ in range(2):
        with pytest.raises(HydraError, match="fusion tail"):
            check_kernels(kernels, CASE)


@pytest.fixture
def records(monkeypatch, tmp_path):
    """Record passes as on a GPU, with facts that tests can change."""
    facts = {"card": "one", "versions": {"triton": "3.6.0"}}
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TILELANG_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(self_check, "_on_record", lambda case: facts)
    monkeypatch.delenv("HYDRA_CHECK_AGAIN", raising=False)
    return facts


def _calls(name="mine", case=CASE):
    """How often a new process with these kernels calls them."""
    calls = []

    def delta_rule(*args, **kwargs):
        calls.append(args)
        return TWINS.delta_rule(*args, **kwargs)

    self_check._passed.clear()
    check_kernels(named("gated_delta_net", name, delta_rule=delta_rule), case)
    return len(calls)


def test_another_process_relies_on_a_pass_on_record(records, monkeypatch):
    assert _calls() == 2
    assert _calls() == 0
    assert _calls(name="other") == 2
    assert _calls(case=dataclasses.replace(CASE, head_dim=8)) == 2
    monkeypatch.setenv("HYDRA_CHECK_AGAIN", "1")
    assert _calls() == 2


@pytest.mark.parametrize("change", [{"card": "two"}, {"versions": {"triton": "3.7.0"}}])
def test_a_pass_counts_for_its_card_and_versions_only(records, change):
    assert _calls() == 2
    records.update(change)
    assert _calls() == 2


def test_every_number_of_heads_is_checked_once(records):
    assert _calls(case=dataclasses.replace(CASE, gdn_heads=(3, 5))) == 4
    assert _calls(case=dataclasses.replace(CASE, gdn_heads=(5,))) == 0
    assert _calls(case=dataclasses.replace(CASE, gdn_heads=(5, 7))) == 2
    assert _calls(case=dataclasses.replace(CASE, gdn_heads=())) == 0  # a dense model


def test_a_failure_is_not_on_record(records):
    kernels = named("fused_kernels", "mine", fusion_tail=without_gate)
    for _ in range(2):
        self_check._passed.clear()
        with pytest.raises(HydraError, match="fusion tail"):
            check_kernels(kernels, CASE)


def test_nothing_is_checked_while_postponed():
    kernels = named("fused_kernels", "mine", fusion_tail=without_gate)
    with self_check.postponed():
        check_kernels(kernels, CASE)
    with pytest.raises(HydraError, match="fusion tail"):
        check_kernels(kernels, CASE)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2.2 * grad


def difference(function):
    """The check's message for a kernel that should double its input."""

    def run(kernels, inputs):
        return function(inputs[0]) if kernels is not TWINS else 2 * inputs[0]

    inputs = {"x": torch.randn(4, 3)}
    return self_check._difference(Kernels(), TWINS, inputs, run, TOLERANCE[torch.float32])


def test_differences_are_described():
    assert difference(lambda x: 2 * x) is None
    assert "the output differs from the reference by 5.0%" in difference(lambda x: 2.1 * x)
    wrong = difference(_WrongGradient.apply)
    assert "the gradient of x differs from the reference by 10.0%" in wrong


def test_nan_and_exceptions_are_differences():
    assert "the output differs" in difference(lambda x: 2 * x + float("nan"))

    def raising(x):
        raise RuntimeError("misaligned address")

    assert difference(raising) == "it raised RuntimeError: misaligned address"


def test_documents_are_such_that_errors_show():
    lengths = [b - a for a, b in zip(BOUNDARIES, BOUNDARIES[1:], strict=False)]
    assert 1 in lengths
    assert len(set(lengths)) == len(lengths)
    tails = [b - a for a, b in zip(self_check.TAIL_BOUNDARIES, self_check.TAIL_BOUNDARIES[1:])]
    assert all(tail <= length for tail, length in zip(tails, lengths, strict=True))


def test_heads_on_which_flash_qla_fails_are_checked_with_flas_own_kernels(monkeypatch, records):
    case = dataclasses.replace(CASE, gdn_heads=(2, 3))
    refused = {}

    def delta_rule(q, *rest):
        if q.shape[1] == 3 and 3 not in refused:
            raise RuntimeError("no available layout found")
        return TWINS.delta_rule(q, *rest)

    monkeypatch.setattr(fla_tuning, "is_flash_qla", lambda case, heads: heads not in refused)
    monkeypatch.setattr(
        fla_tuning, "refuse_flash_qla", lambda case, heads, why: refused.setdefault(heads, why)
    )
    check_kernels(named("gated_delta_net", "fla", delta_rule=delta_rule), case)
    assert list(refused) == [3]
    assert "RuntimeError: no available layout found" in refused[3]


def test_a_wrong_kernel_of_flas_own_is_refused_all_the_same(monkeypatch):
    """After FlashQLA is refused, the check has no other kernel to try."""
    refused = []
    monkeypatch.setattr(fla_tuning, "is_flash_qla", lambda case, heads: heads not in refused)
    monkeypatch.setattr(
        fla_tuning, "refuse_flash_qla", lambda case, heads, why: refused.append(heads)
    )

    def wrong(*args):
        output, state = TWINS.delta_rule(*args)
        return output * 1.1, state

    with pytest.raises(
        HydraError, match=r"delta rule of 2 heads failed with backend\.gated_delta_net=fla"
    ):
        check_kernels(named("gated_delta_net", "fla", delta_rule=wrong), CASE)
    assert refused == [2]


def test_a_called_delta_rule_is_not_compared():
    """Its kernels may do nothing yet: outputs are wrong, and it is neither refused nor passed."""
    calls, gradients = [], []

    def nothing(q, k, v, log_alpha, beta, cu):
        calls.append((tuple(q.shape), cu))
        output = torch.full_like(v, torch.nan) + 0 * (q + k + v) * beta[..., None]
        output = output * log_alpha[..., None]
        output.register_hook(gradients.append)
        return output, None

    case = dataclasses.replace(CASE, gdn_heads=(3, 5))
    kernels = named("gated_delta_net", "fla", delta_rule=nothing)
    call_delta_rules(kernels, case)
    tokens = BOUNDARIES[-1]
    documents = (BOUNDARIES, (0, tokens))
    assert calls == [((tokens, heads, 16), cu) for heads in (3, 5) for cu in documents]
    assert len(gradients) == len(calls)
    with pytest.raises(HydraError, match="gated_delta_net=fla"):
        check_kernels(kernels, case)
    calls.clear()
    call_delta_rules(TWINS, case)
    assert not calls
