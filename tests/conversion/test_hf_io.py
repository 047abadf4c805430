"""Safetensors folders: nothing missing, nothing extra, nothing misshapen, no pickles."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_hydra.checkpoint.canonical import canonical_shapes, is_fp32
from megatron_hydra.conversion import families, hf_io
from megatron_hydra.conversion.hf_config import read_hf_config
from megatron_hydra.errors import HydraError
from tests.checkpoint.models import VARIANTS, hybrid_config, make_hf, random_state

Q = "model.layers.1.self_attn.q_proj.weight"


def convert(folder, dtype=None):
    return hf_io.hf_to_canonical(hf_io.HfWeights(folder), read_hf_config(folder), dtype)


@pytest.fixture
def edited(hf_folders, tmp_path):
    """Copies a folder and changes its tensors."""

    def edit(change, variant="qwen3-tied"):
        folder = tmp_path / "edited"
        shutil.copytree(hf_folders[variant], folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return edit


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_dtypes_are_those_of_the_config(variant, hf_folders):
    tensors = convert(hf_folders[variant])
    shapes = canonical_shapes(read_hf_config(hf_folders[variant]))
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == shapes
    for key in tensors:
        assert tensors.describe(key).shape == shapes[key]
        assert tensors[key].dtype == tensors.describe(key).dtype == torch.float32


def test_heads_are_where_they_belong(hf_folders):
    weights = hf_io.HfWeights(hf_folders["qwen3-tied"])
    tensors = convert(hf_folders["qwen3-tied"])
    prefix = "decoder.layers.1.self_attention."
    assert torch.equal(tensors[prefix + "in.fa.q"][2], weights[Q][32:48])
    out = weights["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(tensors[prefix + "out"][3], out[:, 48:64])


def test_dtype_converts_all_but_fp32_parameters(hf_folders):
    tensors = convert(hf_folders["qwen2"], torch.bfloat16)
    assert {tensors[key].dtype for key in tensors} == {torch.bfloat16}
    assert is_fp32("decoder.layers.0.self_attention.gdn.A_log")


def test_a_missing_tensor_is_named(edited):
    folder = edited(lambda tensors: tensors.pop(Q))
    with pytest.raises(HydraError, match=f"key '{Q}' is missing"):
        convert(folder)


def test_an_extra_tensor_is_named_with_its_file(edited):
    folder = edited(lambda tensors: tensors.update({"model.extra": torch.ones(1)}))
    with pytest.raises(HydraError, match=r"model\.safetensors: key 'model\.extra' is not part"):
        convert(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(edited):
    folder = edited(lambda tensors: tensors.update({Q: tensors[Q][:-1].contiguous()}))
    with pytest.raises(HydraError, match=rf"{Q}' has shape \[63, 40\].*\[64, 40\]"):
        convert(folder)


def test_old_rotary_buffers_are_skipped(edited):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = edited(lambda tensors: tensors.update({name: torch.ones(8)}))
    assert len(convert(folder))


def test_quantised_tensors_are_refused(edited):
    folder = edited(lambda tensors: tensors.update({Q: tensors[Q].to(torch.float8_e4m3fn)}))
    with pytest.raises(HydraError, match=rf"{Q}.*F8_E4M3"):
        convert(folder)


def test_a_tied_model_may_repeat_its_embedding_but_not_contradict_it(edited, hf_folders):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = edited(repeat)
    assert "output_layer.weight" not in convert(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(HydraError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        convert(folder)


def test_an_untied_model_needs_its_own_head(edited):
    folder = edited(lambda tensors: tensors.pop("lm_head.weight"), "qwen2")
    with pytest.raises(HydraError, match=r"'lm_head\.weight' is missing"):
        convert(folder)


# -- folders -------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    folder = make_hf(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_shards_read_like_one_file(sharded, hf_folders):
    one, many = convert(hf_folders["qwen3-tied"]), convert(sharded)
    assert all(torch.equal(one[key], many[key]) for key in one)


def test_index_and_shards_must_agree(sharded):
    index = sharded / hf_io.INDEX
    body = json.loads(index.read_text())
    shard = body["weight_map"].pop(Q)
    index.write_text(json.dumps(body))
    with pytest.raises(HydraError, match=f"{shard}: tensor '{Q}' is not in the index"):
        hf_io.HfWeights(sharded)
    body["weight_map"] |= {Q: shard, "ghost": shard}
    index.write_text(json.dumps(body))
    with pytest.raises(HydraError, match="'ghost' is not in"):
        hf_io.HfWeights(sharded)
    body["weight_map"]["ghost"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(body))
    with pytest.raises(HydraError, match="not the name of a file"):
        hf_io.HfWeights(sharded)


def test_a_missing_or_broken_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(HydraError, match=shard.name):
        hf_io.HfWeights(sharded)
    shard.unlink()
    with pytest.raises(HydraError, match=shard.name):
        hf_io.HfWeights(sharded)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(HydraError, match=r"pytorch_model\.bin.*not opened"):
        hf_io.HfWeights(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(HydraError, match=r"neither model\.safetensors"):
        hf_io.HfWeights(tmp_path)


@pytest.mark.parametrize("max_bytes", [10**9, 30_000])
def test_a_written_model_reads_back_and_loads(max_bytes, hf_folders, tmp_path):
    source = hf_folders["llama-bias-tied"]
    tensors = convert(source)
    shards = hf_io.plan_shards(
        read_hf_config(source), lambda key: tensors.describe(key).dtype, max_bytes
    )
    asked = []

    def load(keys):
        asked.append(keys)
        return {key: tensors[key] for key in keys}

    hf_io.write_hf_weights(tmp_path, shards, load)
    shutil.copy(source / "config.json", tmp_path)
    assert len(asked) == len(list(tmp_path.glob("*.safetensors"))) == len(shards)
    written, original = hf_io.HfWeights(tmp_path), hf_io.HfWeights(source)
    assert set(written) == set(original)
    assert all(torch.equal(written[key], original[key]) for key in original)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_shards_keep_within_their_size():
    model = hybrid_config()
    shards = hf_io.plan_shards(model, lambda key: torch.float32, 20_000)
    sizes = [sum(hf_io.num_bytes(m, torch.float32) for m in shard) for shard in shards]
    assert all(size <= 20_000 for size, shard in zip(sizes, shards, strict=True) if len(shard) > 1)
    flat = [mapping.canonical for shard in shards for mapping in shard]
    assert flat == list(canonical_shapes(model))


def test_a_random_hybrid_goes_to_hugging_face_names_and_back(tmp_path):
    model = hybrid_config(qkv_bias=True, out_bias=True)
    state = random_state(canonical_shapes(model))
    shards = hf_io.plan_shards(model, lambda key: torch.float32)
    hf_io.write_hf_weights(tmp_path, shards, lambda keys: {key: state[key] for key in keys})
    back = hf_io.hf_to_canonical(hf_io.HfWeights(tmp_path), model)
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert len(families.name_map(model)) == len(back)
