"""Attention replayed from static memory against the same attention run anew; on a GPU, real CUDA graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.config.run import BackendConfig, RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.model.attention_graphs import AttentionGraphs
from megatron_hydra.model.layer_spec import attention_graphs, build_gpt_model
from megatron_hydra.parallel import platform
from megatron_hydra.parallel.packed_sequence import PackedSequence
from tests import canonical_access
from tests.parallel.layouts import canonical_weights, tiny

pytestmark = pytest.mark.usefixtures("one_rank")

ROW, T = 12, 48
STREAMS = [
    (0, 12, 17, 24, 36, 48),
    (0, 12, 24, 36, 48),
    (0, 1, 12, 24, 25, 26, 36, 40, 48),
    (0, 2, 4, 6, 8, 12, 24, 25, 26, 30, 32, 34, 36, 40, 48),  # more than there was room for
    (0, 7, 30, 48),  # a document that crosses a row
    (0, 48),
]


class Rerun:
    """In place of CUDA graphs: does the work again, and puts results where the first ones were."""

    def __init__(self):
        self.recorded = 0

    def warm_up(self, work):
        work()

    def record(self, work):
        self.recorded += 1
        results = work()

        def replay():
            for old, new in zip(results, work(), strict=True):
                if old is not None:
                    old.detach().copy_(new.detach())

        return results, replay


def layers(model: ModelConfig, precision="fp32"):
    run = RunConfig(precision=precision)
    gpt = build_gpt_model(model, run)
    canonical_access.load(gpt, canonical_weights(model))
    return [layer.self_attention for layer in gpt.decoder.layers]


def stream(cu) -> PackedSequence:
    return PackedSequence(cu, device=platform.device())


def step(attentions, cu, seed, each=False):
    """Output and all gradients of one micro-batch; ``each``: the backward of a layer follows its forward."""
    generator = torch.Generator().manual_seed(seed)
    size = attentions[0].config.hidden_size
    x = torch.randn(cu[-1], 1, size, generator=generator)
    x = x.to(platform.device(), attentions[0].config.params_dtype).requires_grad_()
    packed, hidden = stream(cu), x
    parameters = [p for attention in attentions for p in attention.parameters()]
    for parameter in parameters:
        parameter.grad = None
    outputs = []
    for attention in attentions:
        output, _ = attention(hidden.detach() if each else hidden, packed_seq_params=packed)
        outputs.append(output.detach().clone())
        if each:
            output.square().sum().backward()
            hidden = output
        else:
            hidden = hidden + output
    if not each:
        hidden.square().sum().backward()
    grads = [p.grad for p in parameters] + ([] if each else [x.grad])
    return [*outputs, *(g.detach().clone() for g in grads)]


def assert_close(got, want, tolerance=3e-4):
    """In norm: the sums of log decays that a reset is part of lose some of their digits."""
    assert len(got) == len(want)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        distance = (a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-3)
        assert distance < tolerance, (number, a.shape, float(distance))


MODELS = {
    "hybrid": tiny(HydraConfig(), ((1, 6), (0,)), num_layers=2),
    "rotary in FA": tiny(HydraConfig(fa_position="rope"), ((1, 6), (0,)), num_layers=2),
    "KDA": tiny(HydraConfig(linear="kda"), ((1, 6), (0,)), num_layers=2),
    "a layer without FA, one without GDN": tiny(HydraConfig(), ((), tuple(range(8))), num_layers=2),
    "dense": tiny(HydraConfig(), ((1, 6), (0,)), num_layers=2).dense(),
}


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_replays_compute_what_the_layer_does_whatever_the_documents_are(name, each):
    plain, replayed = layers(MODELS[name]), layers(MODELS[name])
    recorder = Rerun()
    graphs = AttentionGraphs(ROW, keeps=not each, recorder=recorder)
    for attention in replayed:
        attention.graphs = graphs
    counts = []
    for seed, cu in enumerate([*STREAMS, *STREAMS]):
        want = step(plain, cu, seed, each)
        assert_close(step(replayed, cu, seed, each), want)
        counts.append(recorder.recorded)
    assert counts[-1] == counts[5] == counts[4]  # nothing is recorded again once all fits
    assert counts[0] == 2 * len(plain)  # a forward and a backward for every layer


def test_gradients_add_up_over_micro_batches():
    plain, replayed = layers(MODELS["hybrid"]), layers(MODELS["hybrid"])
    replayed[0].graphs = AttentionGraphs(ROW, keeps=True, recorder=Rerun())
    sums = []
    for attention in (plain[0], replayed[0]):
        for seed, cu in enumerate(STREAMS[:3]):
            x = torch.randn(T, 1, 64, generator=torch.Generator().manual_seed(seed))
            x = x[..., : attention.config.hidden_size]
            attention(x, packed_seq_params=stream(cu))[0].square().sum().backward()
        sums.append([p.grad for p in attention.parameters()])
    assert_close(sums[1], sums[0])


def test_a_frozen_model_replays_its_forward_and_a_trained_one_validates_without():
    attentions = layers(MODELS["hybrid"])
    recorder = Rerun()
    attentions[0].graphs = AttentionGraphs(ROW, keeps=True, recorder=recorder)
    x = torch.randn(T, 1, attentions[0].config.hidden_size)
    with torch.no_grad():
        want = attentions[0](x, packed_seq_params=stream(STREAMS[0]))[0]
        assert recorder.recorded == 0
        attentions[0].requires_grad_(False)
        for _ in range(2):
            got = attentions[0](x, packed_seq_params=stream(STREAMS[0]))[0]
            assert_close([got], [want])
    assert recorder.recorded == 1


def test_a_forward_that_was_replayed_again_refuses_its_backward():
    attention = layers(MODELS["hybrid"])[0]
    attention.graphs = AttentionGraphs(ROW, keeps=True, recorder=Rerun())
    x = torch.randn(T, 1, attention.config.hidden_size)
    first, _ = attention(x, packed_seq_params=stream(STREAMS[0]))
    attention(x, packed_seq_params=stream(STREAMS[0]))
    with pytest.raises(HydraError, match="forward twice before its backward"):
        first.sum().backward()


def test_weights_that_moved_are_recorded_anew():
    attention = layers(MODELS["hybrid"])[0]
    recorder = Rerun()
    attention.graphs = AttentionGraphs(ROW, keeps=True, recorder=recorder)
    x = torch.randn(T, 1, attention.config.hidden_size)
    attention(x, packed_seq_params=stream(STREAMS[0]))
    parameter = next(attention.parameters())
    parameter.data = parameter.data.clone()
    attention(x, packed_seq_params=stream(STREAMS[0]))
    assert recorder.recorded == 4


@pytest.mark.skipif(platform.has_gpu(), reason="there is a GPU")
def test_graphs_need_a_gpu():
    run = RunConfig(backend=BackendConfig(cuda_graphs="attention"))
    with pytest.raises(HydraError, match=r"backend\.cuda_graphs=attention cannot run here"):
        attention_graphs(run)


@pytest.mark.gpu
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cuda_graphs_compute_what_the_layer_does(head_dim, each):
    """In bf16 with the kernels that a run takes, documents that change from call to call included."""
    rows, row = 8, 256
    model = dataclasses.replace(MODELS["hybrid"], head_dim=head_dim, hidden_size=256)
    plain, replayed = layers(model, "bf16"), layers(model, "bf16")
    graphs = AttentionGraphs(row, keeps=not each)
    for attention in replayed:
        attention.graphs = graphs
    whole = tuple(range(0, rows * row + 1, row))
    packed = tuple(sorted({*whole, 5, 6, 300, 700, 1000}))
    for seed, cu in enumerate([whole, packed, whole, tuple(sorted({*packed, 900})), packed]):
        want, got = step(plain, cu, seed, each), step(replayed, cu, seed, each)
        assert_close(got, want, tolerance=3e-2)
