"""The parts of a HydraHead layer: recomputation of each part, parallel branches."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

from megatron_hydra.checkpoint.canonical import canonical_shapes
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.config.run import BackendConfig, RecomputeConfig, RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.model import hydra_attention
from megatron_hydra.model.hydra_attention import HydraAttention
from megatron_hydra.model.layer_spec import build_gpt_model, uses_two_streams
from megatron_hydra.model.parameters import fa_kv_groups, gdn_kv_sources
from megatron_hydra.parallel.head_partition import LayerPartition
from megatron_hydra.parallel.packed_sequence import PackedSequence
from tests import canonical_access
from tests.parallel.layouts import canonical_weights, tiny

pytestmark = pytest.mark.usefixtures("one_rank")

MODEL = tiny(HydraConfig(), ((1, 6),), num_layers=1)
PACKED = PackedSequence((0, 9, 24))


def _layer(**sections) -> HydraAttention:
    run = RunConfig(precision="fp32", **sections)
    gpt = build_gpt_model(MODEL, run)
    canonical_access.load(gpt, canonical_weights(MODEL))
    return gpt.decoder.layers[0].self_attention


def _counted(layer: HydraAttention) -> dict[str, mock.Mock]:
    """Count the calls of the layer's parts."""
    tail = mock.Mock(wraps=layer.fusion.kernels.fusion_tail)
    layer.fusion.kernels = dataclasses.replace(layer.fusion.kernels, fusion_tail=tail)
    counts = {"tail": tail}
    for name in ("fa", "gdn"):
        branch = getattr(layer, name)
        counts[name] = mock.Mock(wraps=branch.forward)
        branch.forward = counts[name]
    return counts


def _gradients(layer: HydraAttention) -> list[torch.Tensor]:
    """The output, then gradients by the input and by every parameter."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 1, MODEL.hidden_size, generator=generator, requires_grad=True)
    output, _ = layer(x, packed_seq_params=PACKED)
    inputs = [x, *layer.parameters()]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


@pytest.mark.parametrize(
    ("modules", "again"),
    [
        (("attention",), {"fa", "gdn", "tail"}),
        (("fa",), {"fa"}),
        (("gdn", "tail"), {"gdn", "tail"}),
        (("mlp",), set()),
    ],
)
def test_recomputing_named_parts_does_not_change_the_result(modules, again) -> None:
    expected = _gradients(_layer())
    layer = _layer(recompute=RecomputeConfig("selective", modules))
    counts = _counted(layer)
    for got, reference in zip(_gradients(layer), expected, strict=True):
        assert torch.equal(got, reference)
    called = {name: count.call_count for name, count in counts.items()}
    assert called == {name: 2 if name in again else 1 for name in called}


def _runs_side_by_side(layer: HydraAttention) -> bool:
    with mock.patch.object(
        hydra_attention, "side_by_side", wraps=hydra_attention.side_by_side
    ) as spy:
        layer(torch.zeros(24, 1, MODEL.hidden_size), packed_seq_params=PACKED)
    return spy.called


def test_branches_run_side_by_side_unless_one_stream_is_asked_for() -> None:
    assert _runs_side_by_side(_layer())
    assert not _runs_side_by_side(_layer(backend=BackendConfig(streams="one")))


def test_branches_run_side_by_side_where_their_own_groups_do_not_communicate() -> None:
    """With FA partition ``heads``, FA uses the context-parallel group only; with ``sequence``, both groups."""
    layer = _layer()
    layer.tp_cp_group = mock.Mock(size=lambda: 4)
    assert layer._branches_are_independent()
    layer.heads.replicated_fa = (1, 6)
    assert not layer._branches_are_independent()
    layer = _layer()
    layer.cp_group = mock.Mock(size=lambda: 2)
    assert not layer._branches_are_independent()


def test_two_streams_by_name_need_a_gpu() -> None:
    with pytest.raises(HydraError, match=r"backend\.streams=two cannot run here"):
        uses_two_streams(RunConfig(backend=BackendConfig(streams="two")))


@pytest.mark.parametrize("qkv", ["decoupled", "shared"])
def test_every_parameter_of_a_rank_without_fa_heads_is_in_the_graph(monkeypatch, qkv) -> None:
    """Overlapped gradient reduction waits for every gradient, also for that of a padded FA gate's bias."""
    model = tiny(HydraConfig(qkv=qkv), ((1, 6),), num_layers=1)
    gdn = (0, 2, 3, 4), (5, 7)
    first_of_two = LayerPartition(0, "heads", fa=((), (1, 6)), gdn=gdn)
    monkeypatch.setattr("megatron_hydra.model.layer_spec.plan_model", lambda *_: (first_of_two,))
    layer = build_gpt_model(model, RunConfig(precision="fp32")).decoder.layers[0].self_attention
    assert layer.projections.in_bias is not None and not layer.heads.in_bias_segments
    output, _ = layer(torch.randn(24, 1, model.hidden_size), packed_seq_params=PACKED)
    output.sum().backward()
    assert not [name for name, parameter in layer.named_parameters() if parameter.grad is None]


# -- qkv=shared against qkv=decoupled -------------------------------------------------------------


def _untied(tensors: dict[str, torch.Tensor], shared: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights of a decoupled layer that equals a shared one: every reader gets a copy."""
    attention = "decoder.layers.0.self_attention."
    decoupled = dataclasses.replace(
        shared, hydra=dataclasses.replace(shared.switches, qkv="decoupled")
    )
    sources = {"fa": fa_kv_groups(decoupled, 0), "gdn": gdn_kv_sources(decoupled, 0)}
    made = {}
    for key in canonical_shapes(decoupled):
        group, _, name = key.removeprefix(attention).partition(".")
        branch, _, part = name.partition(".")
        if key in tensors:
            made[key] = tensors[key]
        elif key.endswith("_norm"):
            made[key] = tensors[attention + name]
        else:
            made[key] = tensors[f"{attention}{group}.{part}"][list(sources[branch])]
    return made


def _summed(tensors: dict[str, torch.Tensor], shared: ModelConfig) -> dict[str, torch.Tensor]:
    """Gradients of the shared layer: the decoupled layer's, summed over all readers."""
    attention = "decoder.layers.0.self_attention."
    sources = {"fa": fa_kv_groups(shared, 0), "gdn": gdn_kv_sources(shared, 0)}
    made = {}
    for key, shape in canonical_shapes(shared).items():
        if not key.startswith(attention):
            continue
        group, _, part = key.removeprefix(attention).partition(".")
        if key in tensors:
            made[key] = tensors[key]
        elif key.endswith("_norm"):
            made[key] = sum(tensors[f"{attention}{b}.{group}"] for b in sources)
        else:
            made[key] = torch.zeros(shape)
            for branch, readers in sources.items():
                copies = tensors[f"{attention}{group}.{branch}.{part}"]
                made[key].index_add_(0, torch.tensor(readers), copies)
    return made


def _output_and_gradients(model: ModelConfig, weights: dict[str, torch.Tensor]):
    gpt = build_gpt_model(model, RunConfig(precision="fp32"))
    canonical_access.load(gpt, weights)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 1, model.hidden_size, generator=generator, requires_grad=True)
    output, _ = gpt.decoder.layers[0].self_attention(x, packed_seq_params=PACKED)
    output.square().sum().backward()
    return output.detach(), x.grad, canonical_access.gather(gpt, lambda p: p.grad)


@pytest.mark.parametrize("gdn_kv", ["mha", "gqa"])
@pytest.mark.parametrize("biased", [False, True])
def test_shared_qkv_is_decoupled_with_equal_weights_and_sums_the_gradients(gdn_kv, biased) -> None:
    """FA heads 1, 6 and 7 in four groups: one group has both kinds, one only FA, two only GDN."""
    shared = tiny(
        HydraConfig(qkv="shared", gdn_kv=gdn_kv), ((1, 6, 7),), num_layers=1, qkv_bias=biased
    )
    decoupled = dataclasses.replace(
        shared, hydra=dataclasses.replace(shared.switches, qkv="decoupled")
    )
    weights = canonical_weights(shared)
    output, into, gradients = _output_and_gradients(shared, weights)
    same, into_too, apart = _output_and_gradients(decoupled, _untied(weights, shared))
    torch.testing.assert_close(output, same, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(into, into_too, rtol=1e-4, atol=1e-5)
    expected = _summed(apart, shared)
    assert set(gradients) == set(expected)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-4, msg=key)
    # The gradient of a group that both kinds read differs from each kind's own.
    attention = "decoder.layers.0.self_attention."
    ours, theirs = gradients[f"{attention}in.k"], apart[f"{attention}in.fa.k"]
    assert float((ours[0] - theirs[0]).norm()) > 1e-2 * float(ours[0].norm())


# -- log_scale=final ------------------------------------------------------------------------------


def test_a_final_log_scale_is_off_in_training_and_on_in_the_finished_model() -> None:
    waiting = tiny(HydraConfig(log_scale="final", log_scale_a=5.0), ((1, 6),), num_layers=1)
    weights = canonical_weights(waiting)

    def output(model: ModelConfig) -> torch.Tensor:
        return _output_and_gradients(model, weights)[0]

    def with_switches(**switches) -> ModelConfig:
        return dataclasses.replace(waiting, hydra=dataclasses.replace(waiting.switches, **switches))

    trained, finished = output(waiting), output(waiting.finished())
    assert torch.equal(trained, output(with_switches(fa_position="none")))
    assert torch.equal(finished, output(with_switches(log_scale="train")))
    assert float((trained - finished).abs().max()) > 1e-3
    assert waiting.finished().finished() == waiting.finished()
