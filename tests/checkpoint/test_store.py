"""The checkpoint folder: exact, complete or absent, and verified before it is opened."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_hydra.checkpoint import store
from megatron_hydra.checkpoint.canonical import LazyTensor, LazyTensors, canonical_shapes
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.errors import HydraError
from tests.checkpoint.models import hybrid_config, random_state


@pytest.fixture(scope="module")
def model():
    return hybrid_config(source={"name": "somewhere"}, hf_config={"model_type": "qwen3"})


@pytest.fixture(scope="module")
def state(model):
    state = random_state(canonical_shapes(model))
    return {key: t if t.dim() == 1 else t.to(torch.bfloat16) for key, t in state.items()}


@pytest.fixture(scope="module")
def saved(model, state, tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    (root / "tokenizer" / "weights.bin").write_text("not a tokenizer file")
    store.save_canonical(root / "saved", state, model, root / "tokenizer", {"stage": "test"})
    return root / "saved"


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_comes_back_bit_for_bit(saved, state, model):
    loaded = store.load_canonical(saved)
    assert list(loaded) == list(state)
    for key, tensor in state.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor)
    assert store.read_model_config(saved) == model
    assert not dist.is_initialized()


def test_holds_config_tokenizer_and_manifest(saved):
    assert sorted(os.listdir(saved)) == ["manifest.json", "model.json", "tokenizer", "weights"]
    assert os.listdir(store.tokenizer_folder(saved)) == ["tokenizer.json"]
    manifest = store.verify_manifest(saved)
    assert manifest["provenance"] == {"stage": "test"}
    assert "weights/.metadata" in manifest["files"]
    assert json.loads((saved / "model.json").read_text())["format"] == "megatron-hydra-model"


def test_some_keys_only(saved, state):
    key = "decoder.layers.3.self_attention.in.fa.q"
    loaded = store.load_canonical(saved, [key])
    assert list(loaded) == [key]
    assert torch.equal(loaded[key], state[key])
    assert torch.equal(store.lazy_canonical(saved)[key], state[key])
    with pytest.raises(HydraError, match=r"no tensor 'decoder\.x'"):
        store.load_canonical(saved, ["decoder.x"])


@pytest.mark.parametrize("pieces", [1, 3])
def test_megatron_reads_our_checkpoints_under_any_sharding(saved, state, pieces):
    """Torch's own reader reads it."""
    key = "decoder.layers.3.self_attention.in.fa.q"
    shape = state[key].shape
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wanted = {
            str(i): ShardedTensor.from_rank_offsets(
                key, torch.empty(shape[0] // pieces, *shape[1:]), (0, i, pieces)
            )
            for i in range(pieces)
        }
        loaded = dist_checkpointing.load(wanted, str(saved / "weights"))
    finally:
        dist.destroy_process_group()
    joined = torch.cat([loaded[str(i)] for i in range(pieces)])
    assert torch.equal(joined, state[key].float())  # bf16 on disk, fp32 in this run


def test_lazy_tensors_are_made_one_at_a_time(model, state, tmp_path):
    made = []

    def lazy(key):
        return LazyTensor(tuple(state[key].shape), state[key].dtype, lambda: make(key))

    def make(key):
        made.append(key)
        return state[key]

    store.save_canonical(tmp_path / "lazy", LazyTensors({k: lazy(k) for k in state}), model)
    assert made == list(state)
    loaded = store.load_canonical(tmp_path / "lazy")
    assert all(torch.equal(loaded[key], state[key]) for key in state)


# -- refusals ------------------------------------------------------------------------------------


def test_an_incomplete_state_dict_leaves_no_folder(model, state, tmp_path):
    key = "decoder.layers.0.self_attention.gamma"
    less = {k: v for k, v in state.items() if k != key}
    with pytest.raises(HydraError, match=f"'{key}' is missing"):
        store.save_canonical(tmp_path / "x", less, model)

    def fail():
        raise HydraError("cannot read")

    broken = {k: LazyTensor(tuple(v.shape), v.dtype, lambda v=v: v) for k, v in state.items()}
    broken[key] = LazyTensor((4,), torch.float32, fail)
    with pytest.raises(HydraError, match="cannot read"):
        store.save_canonical(tmp_path / "x", LazyTensors(broken), model)
    assert list(tmp_path.iterdir()) == []
    assert not dist.is_initialized()


def test_an_existing_folder_is_kept_unless_forced(copy, state, model):
    with pytest.raises(HydraError, match="exists already"):
        store.save_canonical(copy, state, model)
    store.save_canonical(copy, state, model, force=True)
    assert not (copy / "tokenizer").exists()


@pytest.mark.parametrize("how", ["changed", "shorter", "missing", "unlisted"])
def test_a_changed_checkpoint_is_not_opened(copy, how):
    file = copy / "weights" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    if how == "changed":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "shorter":
        file.write_bytes(content[:-1])
    elif how == "missing":
        file.unlink()
    else:
        file = copy / "weights" / "extra.distcp"
        file.write_bytes(b"x")
    with pytest.raises(HydraError, match=str(file)):
        store.load_canonical(copy)


def test_sizes_alone_find_a_truncated_file(copy):
    file = copy / "weights" / "__0_0.distcp"
    store.verify_manifest(copy, sizes_only=True)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(HydraError, match=str(file)):
        store.verify_manifest(copy, sizes_only=True)


def test_without_a_manifest_nothing_is_opened(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(HydraError, match=r"manifest\.json is missing"):
        store.load_canonical(copy)


class _RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_index_that_refers_to_anything_else_is_not_unpickled(copy, tmp_path):
    """It is refused even if the manifest matches."""
    (copy / "weights" / ".metadata").write_bytes(pickle.dumps(_RunsCode(tmp_path / "ran")))
    store.write_manifest(copy)
    with pytest.raises(HydraError, match=r"\.metadata refers to posix\.mkdir"):
        store.load_canonical(copy)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_index_is_named(copy):
    index = copy / "weights" / ".metadata"
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(HydraError, match=r"\.metadata is damaged"):
        store.stored_tensors(copy)


def test_weights_of_another_model_are_refused(copy, model):
    store.write_model_config(copy, dataclasses.replace(model, vocab_size=62))
    store.write_manifest(copy)
    with pytest.raises(HydraError, match=r"word_embeddings.*\[61, 40\].*\[62, 40\]"):
        store.load_canonical(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": "x"}, "format"), ({"version": 2}, "version 2"), ({"colour": 1}, "colour")],
)
def test_a_foreign_model_file_is_refused(copy, change, message):
    body = json.loads((copy / "model.json").read_text()) | change
    (copy / "model.json").write_text(json.dumps(body))
    with pytest.raises(HydraError, match=message):
        store.read_model_config(copy)


def test_a_checkpoint_older_than_a_switch_keeps_its_model(tmp_path):
    """Such a model has separate k, v and QK-norms of FA and GDN heads, and gates without bias."""
    switches = {
        "qkv": "decoupled",
        "fa_gate_bias": False,
        "gdn_position": "rope",
        "log_scale": "train",
    }
    model = hybrid_config(hydra=HydraConfig(**switches))
    folder = tmp_path / "old"
    store.save_canonical(folder, random_state(canonical_shapes(model)), model)
    body = json.loads((folder / "model.json").read_text())
    for switch in switches:
        del body["hydra"][switch]
    (folder / "model.json").write_text(json.dumps(body))
    store.write_manifest(folder, {})
    assert store.read_model_config(folder) == model
    assert set(canonical_shapes(model)) == set(store.load_canonical(folder))


def test_a_runs_folder_means_its_latest_checkpoint(saved, tmp_path, model):
    with pytest.raises(HydraError, match="does not exist"):
        store.resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(HydraError, match="is not a checkpoint"):
        store.resolve_checkpoint(tmp_path)
    shutil.copytree(saved, tmp_path / "step_00000010")
    (tmp_path / "latest").write_text("step_00000010\n")
    assert store.resolve_checkpoint(tmp_path) == tmp_path / "step_00000010"
    assert store.read_model_config(tmp_path) == model
    (tmp_path / "latest").write_text("../step_00000010")
    with pytest.raises(HydraError, match="latest names"):
        store.resolve_checkpoint(tmp_path)
