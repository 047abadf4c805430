"""The identity of a Hugging Face model, from its folder and from memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from megatron_hydra.errors import HydraError
from megatron_hydra.hf_identity import identity_shape, model_identity_from_hf, resolve_hf_folder
from tests.selection.helpers import tiny_model


def test_folder_shards_and_model_give_the_same_identity(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one = model_identity_from_hf(tmp_path / "one")
    assert (one.num_layers, one.num_query_heads, one.num_kv_heads) == (3, 6, 3)
    assert (one.head_dim, one.hidden_size, one.family) == (10, 48, "qwen3")
    for other in (model_identity_from_hf(tmp_path / "many"), model_identity_from_hf(model)):
        assert dataclasses.replace(other, name=one.name) == one


def test_the_fingerprint_sees_the_first_and_the_last_layer() -> None:
    model = tiny_model("llama")
    before = model_identity_from_hf(model).fingerprint
    for layer in (0, 2):
        weight = model.model.layers[layer].self_attn.o_proj.weight
        with torch.no_grad():
            weight[3, 5] += 1
            assert model_identity_from_hf(model).fingerprint != before
            weight[3, 5] -= 1


def test_head_dim_is_derived_where_the_config_has_none(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("head_dim", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_identity_from_hf(tmp_path).head_dim == 8


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_absent_keys_have_transformers_defaults(family: str) -> None:
    config = {
        "model_type": family,
        "num_hidden_layers": 2,
        "num_attention_heads": 64,
        "hidden_size": 4096,
    }
    shape = identity_shape(config, "here")
    theirs = AutoConfig.for_model(**config)
    assert shape["num_kv_heads"] == theirs.num_key_value_heads
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // 64
    assert shape["head_dim"] == head_dim


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(HydraError, match=r"config\.json does not exist"):
        model_identity_from_hf(tmp_path)
    config = {"model_type": "gpt2", "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HydraError, match=r"config\.json: model_type 'gpt2' is not supported"):
        model_identity_from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": ["llama"]}))
    with pytest.raises(HydraError, match=r"model_type \['llama'\] is not supported"):
        model_identity_from_hf(tmp_path)
    config |= {"model_type": "llama", "num_hidden_layers": 2**31}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HydraError, match=r"key 'num_hidden_layers' is .* no whole number from 1"):
        model_identity_from_hf(tmp_path)
    config["num_hidden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HydraError, match="key 'num_attention_heads' is missing"):
        model_identity_from_hf(tmp_path)
    config |= {"num_attention_heads": 4, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HydraError, match=r"neither model\.safetensors nor"):
        model_identity_from_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(HydraError, match=r"model\.safetensors cannot be read"):
        model_identity_from_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(HydraError, match=r"index\.json: tensor 'model\.layers\.0\.self_attn"):
        model_identity_from_hf(tmp_path)
    with pytest.raises(HydraError, match="is not a folder"):
        resolve_hf_folder(tmp_path / "nowhere")
