"""The arguments of FLA's delta rule, checked with a stand-in for its GPU kernels against the definition."""

from __future__ import annotations

import functools
import sys
import types

import pytest
import torch

from megatron_hydra.ops import fla_tuning
from megatron_hydra.ops.fla_delta_rule import (
    fla_gated_delta_rule,
    fla_own_context_parallel,
    shard_kernels,
)
from megatron_hydra.ops.gated_delta_rule import (
    chunked_gated_delta_rule,
    recurrent_gated_delta_rule,
)
from megatron_hydra.ops.kernels import Case, Kernels
from megatron_hydra.ops.linear_rules import GATED_DELTA_RULE, KIMI_DELTA_ATTENTION, RULES
from megatron_hydra.ops.self_check import TOLERANCE, check_kernels

T, HEADS, D = 11, 2, 4


@pytest.fixture
def calls(monkeypatch):
    """Install the stand-ins, which have FLA's signatures; returns the keyword arguments of every call."""
    seen = []

    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, cu_seqlens=None, cu_seqlens_cpu=None, cp_context=None,
    ):  # fmt: skip
        assert len(q) == len(k) == len(v) == len(g) == len(beta)
        assert scale is None  # the default is 1/√d
        assert not use_qk_l2norm_in_kernel
        rows, length = q.shape[:2]
        seen.append(
            {"cu": cu_seqlens, "cu_cpu": cu_seqlens_cpu, "cp_context": cp_context, "rows": rows}
        )
        cu = tuple(range(0, rows * length + 1, length))
        if cu_seqlens is not None:
            assert rows == 1
            cu = tuple(cu_seqlens.tolist())
        inputs = (x.flatten(0, 1) for x in (q, k, v, g, beta))
        output, final = recurrent_gated_delta_rule(*inputs, cu, initial_state)
        return output.unflatten(0, (rows, -1)), final if output_final_state else None

    def chunk_kda(q, k, v, g, beta, use_gate_in_kernel=False, safe_gate=False, **options):
        assert g.shape == q.shape
        assert not (use_gate_in_kernel or safe_gate)
        return chunk_gated_delta_rule(q, k, v, g, beta, **options)

    def build_cp_context(cu_seqlens, group, conv1d_kernel_size=None, cu_seqlens_cpu=None):
        return cu_seqlens, group, cu_seqlens_cpu

    for module, function in (
        ("fla.ops.gated_delta_rule", chunk_gated_delta_rule),
        ("fla.ops.kda", chunk_kda),
        ("fla.ops.cp", build_cp_context),
    ):
        stand_in = types.ModuleType(module)
        setattr(stand_in, function.__name__, function)
        monkeypatch.setitem(sys.modules, module, stand_in)
    for parent in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    return seen


def inputs(rule="gdn"):
    q, k, v = (torch.randn(T, HEADS, D, dtype=torch.float64) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    log_alpha = torch.rand(T, HEADS, *RULES[rule].decays_of_head(D), dtype=torch.float64)
    beta = torch.rand(T, HEADS, dtype=torch.float64)
    return [x.requires_grad_() for x in (q, k, v, -0.1 * log_alpha, beta)]


@pytest.mark.parametrize("cu", [None, (0, T), (0, 1, 6, T)])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_definition_with_gradients(calls, cu, with_state, rule):
    tensors = [x.detach().requires_grad_() for x in inputs(rule)]
    documents = 1 if cu is None else len(cu) - 1
    state = torch.randn(documents, HEADS, D, D, dtype=torch.float64) if with_state else None
    got, final = fla_gated_delta_rule(*tensors, cu, state, fla=RULES[rule].fla)
    want, _ = recurrent_gated_delta_rule(*tensors, cu, state)
    assert final is None
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, tensors, cotangent),
        torch.autograd.grad(want, tensors, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    (call,) = calls
    if documents == 1:  # FLA is faster without boundaries
        assert call["cu"] is None
    else:  # also on the host; otherwise FLA copies them from the GPU
        assert call["cu"].dtype == torch.int64
        assert call["cu_cpu"].tolist() == list(cu)


@pytest.mark.parametrize("head_dim", [4, 128])
def test_documents_of_one_length_are_rows_for_flas_own_kernels_only(calls, monkeypatch, head_dim):
    tensors = [torch.randn(12, HEADS, head_dim, dtype=torch.float64) for _ in range(3)]
    tensors += [
        -torch.rand(12, HEADS, dtype=torch.float64),
        torch.rand(12, HEADS, dtype=torch.float64),
    ]
    cu = (0, 4, 8, 12)
    want, _ = recurrent_gated_delta_rule(*tensors, cu)
    torch.testing.assert_close(
        fla_gated_delta_rule(*tensors, cu, fla=GATED_DELTA_RULE.fla)[0], want
    )
    monkeypatch.setattr(fla_tuning, "_refused", {HEADS})
    torch.testing.assert_close(
        fla_gated_delta_rule(*tensors, cu, fla=GATED_DELTA_RULE.fla)[0], want
    )
    fla_gated_delta_rule(*tensors, cu, dense_rows=False, fla=GATED_DELTA_RULE.fla)
    assert [call["rows"] for call in calls] == [3 if head_dim == 4 else 1, 3, 1]


@pytest.mark.parametrize(
    ("rule", "function"),
    [
        ("gdn", fla_own_context_parallel),
        ("kda", fla_gated_delta_rule),
        ("kda", fla_own_context_parallel),
    ],
)
def test_flas_own_context_parallelism_gets_the_group_and_the_whole_streams_documents(
    calls, rule, function
):
    exchange = types.SimpleNamespace(group="the group", cu_seqlens_global=(0, 5, 22))
    function(*inputs(rule), (0, 5, T), exchange=exchange, fla=RULES[rule].fla)
    (call,) = calls
    boundaries, group, on_host = call["cp_context"]
    assert group == "the group"
    assert boundaries.tolist() == on_host.tolist() == [0, 5, 22]
    assert call["cu"] is None  # FLA cuts the shard's boundaries from those of the whole stream


@pytest.mark.parametrize(
    ("available", "enabled", "accepted", "refused", "kernels"),
    [
        (True, True, True, set(), "FlashQlaShardKernels"),
        (False, True, True, set(), "FlaShardKernels"),
        (True, False, True, set(), "FlaShardKernels"),
        (True, True, False, set(), "FlaShardKernels"),
        (True, True, True, {HEADS}, "FlaShardKernels"),
        (True, True, True, {HEADS + 1}, "FlashQlaShardKernels"),
    ],
)
def test_shards_take_flash_qla_where_fla_would(
    monkeypatch, available, enabled, accepted, refused, kernels
):
    class FlashQLABackend:
        def is_available(self):
            return available

        def is_enabled(self):
            return enabled

        def verify(self, function, *tensors):
            assert function == "chunk_gated_delta_rule" and len(tensors) == 5
            return accepted, "a reason"

    backends = types.ModuleType("backends")
    backends.FlashQLABackend = FlashQLABackend
    for name, module in {
        "fla": types.ModuleType("fla"), "fla.ops": types.ModuleType("ops"),
        "fla.ops.gated_delta_rule": types.ModuleType("rule"),
        "fla.ops.gated_delta_rule.backends": backends,
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fla_tuning, "_refused", refused)
    assert type(shard_kernels(*inputs())).__name__ == kernels


def test_heads_that_flash_qla_refuses_go_past_flas_dispatch(calls, monkeypatch):
    import fla.ops.gated_delta_rule as module

    own = module.chunk_gated_delta_rule

    @functools.wraps(own)
    def dispatched(*args, **kwargs):
        raise RuntimeError("no available layout found")

    monkeypatch.setattr(module, "chunk_gated_delta_rule", dispatched)
    with pytest.raises(RuntimeError, match="no available layout"):
        fla_gated_delta_rule(*inputs(), fla=GATED_DELTA_RULE.fla)
    monkeypatch.setattr(fla_tuning, "_refused", {HEADS})
    tensors = inputs()
    torch.testing.assert_close(
        fla_gated_delta_rule(*tensors, fla=GATED_DELTA_RULE.fla)[0],
        recurrent_gated_delta_rule(*tensors)[0],
    )
    monkeypatch.setattr(fla_tuning, "_refused", {HEADS + 1})  # each number is refused separately
    with pytest.raises(RuntimeError, match="no available layout"):
        fla_gated_delta_rule(*inputs(), fla=GATED_DELTA_RULE.fla)


GPU_TOKENS = 330


@pytest.mark.gpu
@pytest.mark.parametrize("cu", [None, (0, 70, 71, 200, GPU_TOKENS)], ids=["one", "packed"])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("fastest", [0.05, 20.0], ids=["slow", "fast"])
def test_flas_kda_equals_the_twin_on_a_gpu(fastest, d, cu):
    """Outputs and gradients in bf16; a channel decays by up to exp(-0.05) or exp(-20) a token."""
    pytest.importorskip("fla.ops.kda")
    fla_tuning.import_fla()
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (GPU_TOKENS, 3, d)
    q, k, v, cotangent = (torch.randn(shape, generator=generator, device="cuda") for _ in range(4))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    # Log-uniform rates: channels of one key differ by orders of magnitude.
    slowness = torch.rand(shape, generator=generator, device="cuda")
    log_alpha = -fastest * torch.exp(-7.0 * slowness)
    beta = torch.rand(shape[:2], generator=generator, device="cuda")
    given = [x.to(torch.bfloat16).requires_grad_() for x in (q, k, v)]
    given += [x.requires_grad_() for x in (log_alpha, beta)]
    exact = [x.detach().float().requires_grad_() for x in given]
    got, _ = fla_gated_delta_rule(*given, cu, fla=KIMI_DELTA_ATTENTION.fla)
    want, _ = chunked_gated_delta_rule(*exact, cu)
    results = {"output": (got, want)}
    gradients = zip(
        torch.autograd.grad(got, given, cotangent.to(torch.bfloat16)),
        torch.autograd.grad(want, exact, cotangent.to(torch.bfloat16).float()),
        strict=True,
    )
    results |= dict(zip(("q", "k", "v", "log alpha", "beta"), gradients, strict=True))
    errors = {
        name: float((a.detach().float() - b.detach()).norm() / b.detach().norm())
        for name, (a, b) in results.items()
    }
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert all(error < TOLERANCE[torch.bfloat16] for error in errors.values()), errors


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
def test_the_start_up_check_passes_flas_kda_on_a_gpu(d, monkeypatch):
    pytest.importorskip("fla.ops.kda")
    fla_tuning.import_fla()
    monkeypatch.setenv("HYDRA_CHECK_AGAIN", "1")
    names = {**Kernels().names, "gated_delta_net": "fla"}
    kernel = functools.partial(fla_gated_delta_rule, fla=KIMI_DELTA_ATTENTION.fla)
    kernels = Kernels(delta_rule=kernel, names=names)
    case = Case(
        torch.device("cuda"), torch.bfloat16, d, gdn_heads=(2, 7), rule=KIMI_DELTA_ATTENTION
    )
    check_kernels(kernels, case)
