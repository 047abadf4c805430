"""What one layer of HydraHead runs, and when: recomputation by part, branches side by side."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

from megatron_hydra.config.model import HydraConfig
from megatron_hydra.config.run import BackendConfig, RecomputeConfig, RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.model import hydra_attention
from megatron_hydra.model.hydra_attention import HydraAttention
from megatron_hydra.model.layer_spec import build_gpt_model, uses_two_streams
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
    tail = mock.Mock(wraps=layer.kernels.fusion_tail)
    layer.kernels = dataclasses.replace(layer.kernels, fusion_tail=tail)
    counts = {"tail": tail}
    for name in ("fa", "gdn"):
        branch = getattr(layer, name)
        counts[name] = mock.Mock(wraps=branch.forward)
        branch.forward = counts[name]
    return counts


def _gradients(layer: HydraAttention) -> list[torch.Tensor]:
    """Output, then gradients by the input and by every parameter."""
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
def test_what_is_named_is_computed_again_and_nothing_changes(modules, again) -> None:
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
    """FA dealt by heads communicates over the context-parallel group only, by sequence over both."""
    layer = _layer()
    layer.tp_cp_group = mock.Mock(size=lambda: 4)
    assert layer._branches_apart()
    layer.heads.replicated_fa = (1, 6)
    assert not layer._branches_apart()
    layer = _layer()
    layer.cp_group = mock.Mock(size=lambda: 2)
    assert not layer._branches_apart()


def test_two_streams_by_name_need_a_gpu() -> None:
    with pytest.raises(HydraError, match=r"backend\.streams=two cannot run here"):
        uses_two_streams(RunConfig(backend=BackendConfig(streams="two")))
