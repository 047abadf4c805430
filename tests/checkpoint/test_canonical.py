"""Keys and shapes of the canonical state dict."""

from __future__ import annotations

import pytest
import torch

from megatron_hydra.checkpoint import canonical
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.model.parameters import gdn_kv_sources
from tests.checkpoint.models import hybrid_config


def layer(model, index):
    return canonical.layer_shapes(model, index)


def test_a_mixed_layer_stores_heads_of_both_kinds_and_each_kv_group_once():
    shapes = layer(hybrid_config(), 3)  # FA heads 0, 2, 3 read groups 0 and 1; head 1 is GDN
    assert shapes["self_attention.in.fa.q"] == (3, 16, 40)
    assert shapes["self_attention.in.fa.k"] == (2, 16, 40)
    assert shapes["self_attention.in.gdn.k"] == (1, 16, 40)
    assert shapes["self_attention.gdn.conv_v"] == (1, 16, 4)
    assert shapes["self_attention.gamma"] == (4,)
    assert shapes["self_attention.out"] == (4, 40, 16)
    assert shapes["mlp.linear_fc1.weight"] == (112, 40)


def test_keys_of_an_absent_kind_are_absent():
    assert not [key for key in layer(hybrid_config(), 1) if ".fa." in key]
    assert not [key for key in layer(hybrid_config(), 2) if ".gdn." in key]


def test_gqa_shares_keys_and_values_among_gdn_heads():
    model = hybrid_config(hydra=HydraConfig(gdn_kv="gqa"))
    assert layer(model, 1)["self_attention.in.gdn.q"] == (4, 16, 40)
    assert layer(model, 1)["self_attention.in.gdn.k"] == (2, 16, 40)
    assert gdn_kv_sources(model, 1) == (0, 1)
    assert gdn_kv_sources(hybrid_config(), 1) == (0, 0, 1, 1)


@pytest.mark.parametrize("gdn_kv", ["mha", "gqa"])
def test_shared_qkv_stores_every_group_and_the_norms_once(gdn_kv):
    model = hybrid_config(hydra=HydraConfig(qkv="shared", gdn_kv=gdn_kv), qkv_bias=True)
    for index in range(model.num_layers):
        names = layer(model, index)
        norms = {key.rpartition(".")[2] for key in names if key.endswith("_norm")}
        assert sum(key.endswith("_norm") for key in names) == len(norms) == 2
        for part in "kv":
            assert [key for key in names if key.endswith(f".{part}") and ".in." in key] == [
                f"self_attention.in.{part}"
            ]
            assert names[f"self_attention.in.{part}"] == (2, 16, 40)
            assert names[f"self_attention.in_bias.{part}"] == (2, 16)
    convolved = layer(model, 1)["self_attention.gdn.conv_k"]
    assert convolved == ({"mha": 4, "gqa": 2}[gdn_kv], 16, 4)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"fa_gate": False}, [f"self_attention.{g}.fa.gate" for g in ("in", "in_bias")]),
        ({"fa_gate_bias": False}, ["self_attention.in_bias.fa.gate"]),
        ({"gdn_gate": False}, ["self_attention.in.gdn.gate"]),
        ({"short_conv": False}, [f"self_attention.gdn.conv_{p}" for p in "qkv"]),
        ({"fusion": "concat"}, ["self_attention.gamma"]),
    ],
)
def test_each_switch_removes_its_own_keys(change, names):
    whole, less = (layer(hybrid_config(hydra=HydraConfig(**c)), 3) for c in ({}, change))
    assert sorted(set(whole) - set(less)) == sorted(names)
    assert set(less) <= set(whole)


def test_switches_add_their_own_keys():
    gated = layer(hybrid_config(hydra=HydraConfig(fusion="gated")), 0)
    assert gated["self_attention.fusion_gate"] == (4, 40)
    biased = layer(hybrid_config(qkv_bias=True, out_bias=True), 3)
    assert biased["self_attention.in_bias.fa.k"] == (2, 16)
    assert biased["self_attention.in_bias.gdn.q"] == (1, 16)
    assert biased["self_attention.out_bias"] == (40,)


@pytest.mark.parametrize("mixer", ["token", "parallel"])
def test_heads_that_are_both_have_the_tensors_of_both(mixer):
    every = ((0, 1, 2, 3),) * 4
    model = hybrid_config(hydra=HydraConfig(mixer=mixer), full_attention_heads=every)
    shapes = layer(model, 1)
    assert shapes["self_attention.in.fa.q"] == shapes["self_attention.in.gdn.q"] == (4, 16, 40)
    assert shapes["self_attention.in.fa.k"] == (2, 16, 40)
    assert shapes["self_attention.in.gdn.k"] == (4, 16, 40)
    assert shapes["self_attention.gamma.fa"] == shapes["self_attention.gamma.gdn"] == (4,)
    assert shapes["self_attention.out"] == (4, 40, 16)
    assert "self_attention.gamma" not in shapes


def test_a_tied_model_has_no_output_layer():
    keys = canonical.canonical_shapes(hybrid_config(tie_embeddings=True))
    assert "output_layer.weight" not in keys
    assert "output_layer.weight" in canonical.canonical_shapes(hybrid_config())


def test_the_dense_model_has_neither_gates_nor_scales():
    shapes = layer(hybrid_config().dense(), 0)
    assert shapes["self_attention.in.fa.k"] == (2, 16, 40)
    assert not [key for key in shapes if "gate" in key or "gamma" in key or "gdn" in key]


@pytest.mark.parametrize("kind", ["missing", "not part of this model", "has shape"])
def test_missing_extra_and_misshapen_keys_are_refused(kind):
    model = hybrid_config()
    shapes = canonical.canonical_shapes(model)
    key = "decoder.layers.0.self_attention.gamma"
    if kind == "missing":
        del shapes[key]
    elif kind == "has shape":
        shapes[key] = (5,)
    else:
        key = "decoder.layers.0.self_attention.delta"
        shapes[key] = (4,)
    with pytest.raises(HydraError, match=rf"here: key '{key}' .*{kind}"):
        canonical.check_shapes(shapes, model, "here")


def test_lazy_tensors_are_made_on_access_only():
    made = []

    def make():
        made.append(1)
        return torch.ones(2)

    tensors = canonical.LazyTensors({"a": canonical.LazyTensor((2,), torch.float32, make)})
    assert canonical.describe(tensors, "a").shape == (2,)
    assert not made
    assert torch.equal(tensors["a"], torch.ones(2))
    assert len(made) == 1
