"""config.json: which keys are read, refused and restored."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from megatron_hydra.config.model import HydraConfig
from megatron_hydra.conversion.hf_config import (
    hf_config_from_model,
    model_from_hf_config,
    read_hf_config,
    same_architecture,
)
from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import HeadMap
from tests.checkpoint.models import LLAMA3_ROPE, VARIANTS, hybrid_config

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 3,
}


def read(without=(), **changes):
    return model_from_hf_config({k: v for k, v in (QWEN3 | changes).items() if k not in without})


def test_reads_what_the_file_says():
    model = read()
    assert (model.num_query_heads, model.num_kv_heads, model.head_dim) == (4, 2, 16)
    assert model.tie_embeddings and model.qk_norm and not model.qkv_bias and not model.out_bias
    assert model.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}


def test_rope_is_read_from_its_old_and_its_new_place():
    old = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    as_new = read(without=("rope_theta",), rope_parameters=LLAMA3_ROPE)
    as_old = read(rope_theta=5000, rope_scaling=old)
    oldest = {"type" if key == "rope_type" else key: value for key, value in old.items()}
    as_oldest = read(rope_theta=5000, rope_scaling=oldest)
    assert as_new.rope_parameters == as_old.rope_parameters == LLAMA3_ROPE
    assert as_oldest.rope_parameters == LLAMA3_ROPE


@pytest.mark.parametrize("place", ["old", "new"])
def test_rope_equals_that_of_transformers(place):
    rope = {"rope_type": "yarn", "factor": 4.0}
    changes = (
        {"rope_theta": 7e4, "rope_scaling": rope}
        if place == "old"
        else {"rope_parameters": {**rope, "rope_theta": 7e4}}
    )
    body = {k: v for k, v in QWEN3.items() if not k.startswith("rope")} | changes
    theirs = AutoConfig.for_model(**json.loads(json.dumps(body))).rope_parameters
    assert model_from_hf_config(body).rope_parameters == theirs


def test_a_config_without_rope_theta_means_10000():
    assert read(without=("rope_theta",)).rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": ["qwen3"]}, "model_type"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope'"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "remove one"),
        (
            {
                "rope_parameters": {"rope_type": "default"},
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            "contradict",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1},
            "use_sliding_window",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(changes, message):
    with pytest.raises(HydraError, match=rf"config\.json: .*{message}"):
        read(**changes)


@pytest.mark.parametrize("key", ["hidden_size", "rms_norm_eps", "num_attention_heads"])
def test_a_missing_key_is_named(key):
    with pytest.raises(HydraError, match=f"key '{key}' is missing"):
        read(without=(key,))


def test_a_sliding_window_that_no_layer_uses_is_fine():
    read(use_sliding_window=True, sliding_window=128, max_window_layers=2)
    read(use_sliding_window=False, sliding_window=128, max_window_layers=0)


def test_folder_without_or_with_broken_config(tmp_path):
    with pytest.raises(HydraError, match=r"config\.json does not exist"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HydraError, match="not valid JSON"):
        read_hf_config(tmp_path)


def test_the_original_config_comes_back_key_for_key():
    assert hf_config_from_model(read(), "bfloat16") == QWEN3
    assert hf_config_from_model(read(), "float32") == QWEN3 | {"torch_dtype": "float32"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_made_from_nothing_means_the_same_to_transformers(variant, hf_folders):
    model = read_hf_config(hf_folders[variant])
    original = AutoConfig.from_pretrained(hf_folders[variant]).to_dict()
    original.setdefault("head_dim", 10)  # Qwen2 has the key only if it differs from D/H
    body = hf_config_from_model(type(model)(**{**vars(model), "hf_config": {}}), "float32")
    again = AutoConfig.for_model(**json.loads(json.dumps(body))).to_dict()
    ignored = {"transformers_version", "_name_or_path", "bos_token_id", "eos_token_id"}
    assert {k: v for k, v in again.items() if k not in ignored} == {
        k: v for k, v in original.items() if k not in ignored
    }


def test_a_model_that_the_family_cannot_express_is_refused():
    model = read(attention_bias=True)
    odd = type(model)(**{**vars(model), "out_bias": False})
    with pytest.raises(HydraError, match="cannot express"):
        hf_config_from_model(odd, "float32")


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_a_hybrid_config_is_read_back(family):
    hydra = HydraConfig(fusion="gated", gdn_kv="gqa", conv_width=3, log_scale_a=100.0)
    model = hybrid_config(family, hydra=hydra, qkv_bias=family == "qwen2", hf_config=QWEN3)
    body = hf_config_from_model(model, "bfloat16", {"AutoConfig": "x.Y"})
    assert body["auto_map"] == {"AutoConfig": "x.Y"}
    assert body["bos_token_id"] == 3
    assert same_architecture(model_from_hf_config(json.loads(json.dumps(body))), model)


def test_an_export_older_than_a_switch_keeps_its_model():
    body = hf_config_from_model(hybrid_config(hydra=HydraConfig(fa_gate_bias=False)), "bfloat16")
    old = {k: v for k, v in body["hydra"].items() if k not in ("fa_gate_bias", "qkv", "log_scale")}
    assert model_from_hf_config({**body, "hydra": old}).hydra == HydraConfig(fa_gate_bias=False)


def test_a_hybrid_config_with_an_unknown_switch_is_refused():
    body = hf_config_from_model(hybrid_config(), "bfloat16")
    body["hydra"] = {**body["hydra"], "fushion": "scale"}
    with pytest.raises(HydraError, match=r"hydra.*fushion"):
        model_from_hf_config(body)


@pytest.fixture
def export(tmp_path):
    """The config.json and the head_map.json of an exported hybrid."""
    model = hybrid_config()
    (tmp_path / "config.json").write_text(json.dumps(hf_config_from_model(model, "bfloat16")))
    heads = model.full_attention_heads
    HeadMap(model.identity(), heads, "random", "1:1").save(tmp_path / "head_map.json")
    return tmp_path


def test_the_head_map_of_an_export_is_read(export):
    assert read_hf_config(export).head_map == json.loads((export / "head_map.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "is not a head map"),
        ({"colour": 1}, "colour"),
        ({"model": {**vars(hybrid_config().identity()), "head_dim": 8}}, "head_dim is 8"),
        ({"full_attention_heads": [[1], [], [0, 1, 2, 3], [0, 2, 3]]}, "in the same folder"),
    ],
)
def test_a_head_map_that_is_not_the_exports_is_refused(change, message, export):
    path = export / "head_map.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(HydraError, match=rf"head_map\.json.*{message}"):
        read_hf_config(export)
