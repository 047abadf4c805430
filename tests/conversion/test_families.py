"""Name maps: exact both ways, and complete against the real models."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_hydra.checkpoint.canonical import canonical_shapes
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.conversion import families
from megatron_hydra.conversion.hf_config import hf_config_from_model, read_hf_config
from megatron_hydra.errors import HydraError
from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
from megatron_hydra.hf.modeling_hydrahead import HydraHeadForCausalLM
from megatron_hydra.hf_identity import DEFAULT_HEAD_DIM, DEFAULT_KV_HEADS
from megatron_hydra.model.parameters import PARAMETERS
from tests.checkpoint.models import VARIANTS, hybrid_config


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        (families.SAME, (5, 3)),
        (families.HEADS, (4, 3, 5)),
        (families.HEADS, (4, 3)),
        (families.HEAD_COLUMNS, (4, 5, 3)),
        (families.GATE_AND_UP, (6, 5)),
        (families.CHANNELS, (4, 3, 2)),
    ],
)
def test_forms_are_exact_both_ways(form, shape):
    tensor = torch.randn(shape)
    parts = form.to_hf(tensor)
    assert [tuple(part.shape) for part in parts] == form.hf_shapes(shape)
    assert all(part.is_contiguous() for part in parts)
    assert torch.equal(form.to_canonical(parts, shape), tensor)


def test_forms_put_heads_where_the_contract_says():
    weight = torch.randn(12, 5)  # 4 heads of 3 channels
    assert torch.equal(families.HEADS.to_canonical([weight], (4, 3, 5))[2], weight[6:9])
    out = torch.randn(5, 12)
    heads = families.HEAD_COLUMNS.to_canonical([out], (4, 5, 3))
    assert torch.equal(heads[2], out[:, 6:9])
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    both = families.GATE_AND_UP.to_canonical([gate, up], (6, 5))
    assert torch.equal(both[:3], gate)
    assert torch.equal(both[3:], up)


def mapped(model):
    return {
        name: shape for mapping in families.name_map(model) for name, shape in mapping.hf.items()
    }


def shapes_of(module):
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_maps_name_every_parameter_of_the_transformers_model(variant, hf_folders):
    config = AutoConfig.from_pretrained(hf_folders[variant])
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    assert mapped(read_hf_config(hf_folders[variant])) == shapes_of(module)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("fusion", ["scale", "gated", "concat"])
def test_hybrid_maps_name_every_parameter_of_the_exported_model(family, fusion):
    for flag, gdn_kv in itertools.product((True, False), ("mha", "gqa")):
        hydra = HydraConfig(
            fusion=fusion, gdn_kv=gdn_kv, fa_gate=flag, gdn_gate=not flag, short_conv=flag,
            linear="gdn" if flag else "kda",
        )  # fmt: skip
        model = hybrid_config(family, hydra=hydra, qkv_bias=flag, out_bias=not flag)
        config = hf_config_from_model(model, "float32")
        with torch.device("meta"):
            module = HydraHeadForCausalLM(HydraHeadConfig(**config))
        assert mapped(model) == shapes_of(module)


def test_a_map_covers_every_canonical_key_once():
    model = hybrid_config()
    keys = [mapping.canonical for mapping in families.name_map(model)]
    assert keys == list(canonical_shapes(model))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_defaults_of_absent_keys_are_those_of_transformers(name):
    config = AutoConfig.for_model(name)
    heads = config.num_attention_heads
    assert (DEFAULT_KV_HEADS[name] or heads) == config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    assert (DEFAULT_HEAD_DIM[name] or config.hidden_size // heads) == head_dim
    assert config.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [("llama", {"qk_norm": True}, "fa.q_norm"), ("qwen2", {"out_bias": True}, "out_bias")],
)
def test_a_tensor_that_the_family_does_not_have_is_refused(family, changes, key):
    model = hybrid_config(family, **changes).dense()
    with pytest.raises(HydraError, match=rf"'{family}' has no Hugging Face name for '.*{key}'"):
        families.name_map(model)


def test_an_export_keeps_in_fp32_what_the_table_says():
    fp32 = {row.hf for row in PARAMETERS if row.fp32}
    assert fp32 == set(HydraHeadForCausalLM._keep_in_fp32_modules_strict)
