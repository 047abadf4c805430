"""The delta rule of shards against the whole stream, with plain rules and stand-ins for the kernels."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_hydra.ops import flash_qla_shard_kernels
from megatron_hydra.ops.gated_delta_rule import chunked_gated_delta_rule
from megatron_hydra.ops.linear_rules import GATED_DELTA_RULE
from megatron_hydra.ops.sharded_delta_rule import (
    RuleKernels,
    ShardsHere,
    sharded_gated_delta_rule,
    shards_of,
)
from tests.kernel_processes import needs_triton, output_lines
from tests.ops import flash_qla_stand_in

HEADS, D, DV, SHARD = 2, 8, 8, 24

STREAMS = {  # name -> documents of a stream of four shards, and shards that lie inside one document
    "one document": ((0, 96), (1, 2)),
    "cut in every shard": ((0, 5, 30, 50, 90, 96), ()),
    "from the middle of a shard over two others": ((0, 10, 80, 96), (1, 2)),
    "cut at the shards' ends": ((0, 24, 48, 72, 96), ()),
    "one cut at a shard's end": ((0, 48, 96), ()),
    "through one shard and no further": ((0, 20, 72, 96), (1,)),
    "single tokens at the ends": ((0, 23, 24, 25, 47, 73, 95, 96), (2,)),
}


def inputs(tokens: int, decay: float, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Half-lives of about ln 2 / (decay / 2) tokens, which show a leak or a lost state."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k, v = normal(tokens, HEADS, D), normal(tokens, HEADS, D), normal(tokens, HEADS, DV)
    rates = torch.rand(2, tokens, HEADS, generator=generator, dtype=dtype)
    k = torch.nn.functional.normalize(k, dim=-1)
    return [x.requires_grad_() for x in (q, k, v, -decay * rates[0], 0.3 * rates[1])]


def with_gradients(function, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of its weighted sum."""
    output = function(*tensors)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, weights)]


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "size", "decay"),
    [
        *((name, 4, 0.01) for name in STREAMS),
        ("one document", 4, 0.0),
        ("one document", 4, 2.0),
        ("one document", 2, 0.01),
        ("from the middle of a shard over two others", 3, 0.01),
    ],
)
def test_shards_equal_the_whole_stream_with_gradients(name, size, decay):
    cu, _ = STREAMS[name]
    tensors, exchange = inputs(cu[-1], decay), ShardsHere(cu, size)
    kernels = RuleKernels(chunked_gated_delta_rule)
    want = with_gradients(lambda *x: chunked_gated_delta_rule(*x, cu)[0], tensors)
    got = with_gradients(lambda *x: sharded_gated_delta_rule(kernels, x, exchange), tensors)
    assert_equal(got, want)


@pytest.mark.parametrize("name", STREAMS)
def test_shards_know_what_crosses_their_ends(name):
    cu, through = STREAMS[name]
    shards = shards_of(cu, 4)
    assert [shard.start for shard in shards] == [0, 24, 48, 72]
    assert tuple(i for i, shard in enumerate(shards) if shard.through) == through
    for shard, following in zip(shards, shards[1:], strict=False):
        assert shard.end == following.start
        assert shard.goes_on == following.begun == (shard.end not in cu)
    assert not shards[0].begun and not shards[-1].goes_on
    rebuilt = {0, *(shard.start + c for shard in shards for c in shard.cu_seqlens)}
    assert rebuilt == set(cu) | {0, 24, 48, 72, 96}


def test_a_lost_state_or_gradient_shows():
    """In the streams above, the state that crosses a shard's end changes the results."""
    cu = (0, 96)
    tensors = inputs(96, 0.01)
    want = with_gradients(lambda *x: chunked_gated_delta_rule(*x, cu)[0], tensors)

    class Forgetful(ShardsHere):
        def enter(self, maps, like):
            states, transitions = super().enter(maps, like)
            return [None] * len(states), transitions

    class OneWay(ShardsHere):
        def leave(self, gradients, transitions, like):
            return [None] * len(gradients)

    # In order: the output, the gradients by q, k, v, log α and β. The gradient by v needs no entering state.
    for exchange, wrong in ((Forgetful(cu, 4), (0, 1, 2, 4, 5)), (OneWay(cu, 4), (2, 3, 4, 5))):
        got = with_gradients(
            lambda *x, exchange=exchange: sharded_gated_delta_rule(
                RuleKernels(chunked_gated_delta_rule), x, exchange
            ),
            tensors,
        )
        for i in wrong:
            assert (got[i] - want[i]).norm() > 0.01 * want[i].norm()


def test_without_gradients_nothing_is_kept():
    tensors, kept = inputs(96, 0.01), []
    kernels, exchange = RuleKernels(chunked_gated_delta_rule), ShardsHere((0, 96), 2)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x), torch.no_grad():
        got = sharded_gated_delta_rule(kernels, tuple(tensors), exchange)
    assert not got.requires_grad and not kept
    torch.testing.assert_close(got, chunked_gated_delta_rule(*tensors)[0].detach())


# -- FlashQLA's kernels, by stand-ins -------------------------------------------------------------

PARTS = {  # four shards; parts of 128 tokens. Boundaries, the smallest log α
    "one document, remembered": ((0, 1280), -0.001),
    "one document, forgotten within parts": ((0, 1280), -0.4),
    "forgotten, and cut beside the chunks": ((0, 196, 1010, 1280), -0.4),
    "remembered, and cut beside the chunks": ((0, 30, 530, 561, 1180, 1280), -0.002),
}


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_the_order_of_flash_qlas_kernels(monkeypatch, name, split):
    flash_qla_stand_in.install(monkeypatch, split)
    flash_qla_shard_kernels._parts.cache_clear()
    (cu, decay), d = PARTS[name], 4
    generator = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(3, cu[-1], 2, d, generator=generator)
    rates = torch.rand(2, cu[-1], 2, generator=generator)
    rates[0, :, 1] *= 0.1  # another decay: parts fall back for one head only
    k = torch.nn.functional.normalize(k, dim=-1)
    tensors = [x.requires_grad_() for x in (q, k, v, decay * rates[0], 0.01 * rates[1])]
    want = with_gradients(lambda *x: chunked_gated_delta_rule(*x, cu)[0], tensors)
    kernels, exchange = flash_qla_shard_kernels.FlashQlaShardKernels(), ShardsHere(cu, 4)
    got = with_gradients(lambda *x: sharded_gated_delta_rule(kernels, x, exchange), tensors)
    flash_qla_shard_kernels._parts.cache_clear()
    # A part leaves out what it has forgotten (e^-10); shards pass their maps in fp32.
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < (2e-4 if decay == -0.4 else 1e-5) * b.norm()


def test_composed_maps_are_one_after_the_other():
    for parts in (1, 2, 3, 7):
        states, m = torch.randn(parts, 2, 3, 5), torch.randn(parts, 2, 3, 3)
        remembered = torch.rand(parts, 2) < 0.8
        m[~remembered] = float("nan")  # not read
        state, transition = flash_qla_shard_kernels.composed(states, m, remembered)
        want, through = torch.zeros(2, 3, 5), torch.eye(3).expand(2, -1, -1)
        for p in range(parts):
            step = torch.where(remembered[p][:, None, None], m[p], 0.0)
            want, through = states[p] + step @ want, step @ through
        torch.testing.assert_close(state, want)
        torch.testing.assert_close(transition, through)


@pytest.mark.slow
@needs_triton
def test_flas_kernels_of_shards_in_the_interpreter():
    pytest.importorskip("fla")
    lines = output_lines("tests.ops.fla_shards_interpreted", interpreted=True, timeout=280)
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(results) == 4
    for result in results[:3]:
        assert max(result.values()) < 2e-6, result
    assert max(results[3].values()) < 3e-5, results[3]  # −80 costs digits in sums of log α


# -- on a GPU -------------------------------------------------------------------------------------

LONG = 8192
ON_A_GPU = {  # documents, the smallest log α, the largest β; four shards
    "one document that is felt in the last shard": ((0, LONG), -0.0005, 0.02),
    "one document that forgets": ((0, LONG), -0.1, 1.0),
    "cut in every shard": ((0, 1000, 3000, 3001, 4500, 8000, LONG), -0.01, 0.2),
    "through two shards": ((0, 1037, 7001, LONG), -0.0005, 0.02),
    "short documents": ((0, 70, 71, 200, 330, 520), -0.005, 0.2),
    "many documents": (tuple(range(0, LONG, 96)) + (LONG,), -0.005, 0.2),
}


def kernels_of(name: str):
    from megatron_hydra.ops import fla_tuning
    from megatron_hydra.ops.fla_shard_kernels import FlaShardKernels
    from megatron_hydra.ops.flash_qla_shard_kernels import FlashQlaShardKernels

    fla_tuning.import_fla()
    if name == "FlashQLA":
        pytest.importorskip("flash_qla")
        return FlashQlaShardKernels()
    return FlaShardKernels()


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [14, 16])
@pytest.mark.parametrize("name", ON_A_GPU)
@pytest.mark.parametrize("kernels", ["FlashQLA", "FLA"])
def test_kernels_of_shards_equal_the_whole_stream_on_a_gpu(kernels, name, heads):
    """In bf16, against the twin in fp32 on the same rounded inputs: about as near as without shards."""
    from megatron_hydra.ops.fla_delta_rule import fla_gated_delta_rule

    shard_kernels, (cu, decay, strength) = kernels_of(kernels), ON_A_GPU[name]
    generator = torch.Generator("cuda").manual_seed(7)

    def normal() -> torch.Tensor:
        return torch.randn(cu[-1], heads, 128, generator=generator, device="cuda")

    rates = torch.rand(2, cu[-1], heads, generator=generator, device="cuda")
    unit = torch.nn.functional.normalize
    wide = [unit(normal(), dim=-1), unit(normal(), dim=-1), normal()]
    low = [x.bfloat16().requires_grad_() for x in wide]
    low += [(decay * rates[0]).requires_grad_(), (strength * rates[1]).requires_grad_()]
    wide = [x.detach().float().requires_grad_() for x in low]
    cotangent = normal()

    def results(function, tensors):
        output = function(tensors)
        grads = torch.autograd.grad(output, tensors, cotangent.to(output.dtype))
        return [output.detach().float(), *(grad.float() for grad in grads)]

    want = results(lambda x: chunked_gated_delta_rule(*x, cu)[0], wide)
    whole = results(lambda x: fla_gated_delta_rule(*x, cu, fla=GATED_DELTA_RULE.fla)[0], low)
    exchange = ShardsHere(cu, 4)
    got = results(lambda x: sharded_gated_delta_rule(shard_kernels, tuple(x), exchange), low)
    for what, a, b, c in zip(("o", "q", "k", "v", "log α", "β"), got, want, whole, strict=True):
        error, least = (float((x - b).norm() / b.norm()) for x in (a, c))
        print(f"{kernels} {heads} heads, {name}, {what}: {error:.2e}, unsharded {least:.2e}")
        assert error < max(2 * least, 1e-2), (what, error, least)


@pytest.mark.gpu
def test_flash_qla_computes_shards_where_it_is_installed(monkeypatch):
    pytest.importorskip("flash_qla")
    from megatron_hydra.ops import fla_tuning
    from megatron_hydra.ops.fla_delta_rule import shard_kernels

    monkeypatch.delenv("FLA_FLASH_QLA", raising=False)
    kernels_of("FLA")
    x = [torch.zeros(64, 14, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    x += [torch.zeros(64, 14, device="cuda") for _ in range(2)]
    assert type(shard_kernels(*x)).__name__ == "FlashQlaShardKernels"
    monkeypatch.setattr(fla_tuning, "_refused", {14})
    assert type(shard_kernels(*x)).__name__ == "FlaShardKernels"
