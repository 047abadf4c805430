"""The head map: round trip, and refusal of invalid maps."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import HeadMap, ModelIdentity, num_full_attention_heads, parse_ratio

MODEL = ModelIdentity("tiny", "", "qwen3", 2, 4, 2, 8, 32, "sha256:abc")


def tiny_map(**changes) -> HeadMap:
    fields = {
        "model": MODEL, "full_attention_heads": ((1,), (0, 3)), "strategy": "interp",
        "ratio": "3:1", "scores": {"needles": [[0.0, 1.0, 0.5, 0.1], [0.9, 0.2, 0.3, 0.8]]},
        "ranking": ((0, 1), (1, 0), (1, 3)),
    } | changes  # fmt: skip
    return HeadMap(**fields)


def test_round_trip(tmp_path):
    original = tiny_map(details={"dropped": 3})
    original.save(tmp_path / "map.json")
    loaded = HeadMap.load(tmp_path / "map.json")
    assert loaded == original
    assert loaded.fingerprint() == original.fingerprint()
    assert loaded.gated_delta_net_heads(1) == (1, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["map.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full_attention_heads": ((1,),)}, "1 layers, its model has 2"),
        ({"full_attention_heads": ((4,), ())}, "layer 0: head 4 does not exist"),
        ({"full_attention_heads": ((1, 0), ())}, "layer 0.*sorted"),
        ({"full_attention_heads": ((1, 1), ())}, "layer 0.*no repeats"),
        ({"granularity": "kv_group"}, "layer 0.*KV group 0"),
        ({"granularity": "layer"}, "granularity 'layer'"),
        ({"ratio": "7"}, "ratio '7'"),
        ({"ranking": ((2, 0),)}, r"ranking: \[2, 0\] does not exist"),
        ({"ranking": ((0, -1),)}, r"ranking: \[0, -1\] does not exist"),
        ({"ranking": ((0, 1), (0, 1))}, "ranking: a head appears twice"),
        ({"scores": {"needles": [[0.0] * 4]}}, "'needles' are not 2 layers of 4 heads"),
        ({"scores": {"needles": [[0.0] * 4, [0.0]]}}, "'needles' are not 2 layers of 4 heads"),
    ],
)
def test_invalid_maps_are_refused(change, message):
    with pytest.raises(HydraError, match=message):
        tiny_map(**change)


def test_whole_kv_groups_are_accepted():
    assert tiny_map(granularity="kv_group", full_attention_heads=((0, 1), (2, 3)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda body: body.pop("strategy"), "key 'strategy' is missing"),
        (lambda body: body.update(colour=1), "key 'colour' is unknown"),
        (lambda body: body.update(version=2), "version 2 is not supported"),
        (lambda body: body.update(format="x"), "is not a head map"),
        (lambda body: body["model"].pop("num_layers"), "key 'num_layers' is missing"),
        (lambda body: body.update(full_attention_heads=[["a"], []]), "wrong type"),
        (lambda body: body.update(full_attention_heads=[[1.7], []]), "wrong type"),
        (lambda body: body.update(full_attention_heads=["12", []]), "wrong type"),
        (lambda body: body.update(full_attention_heads=[[True], []]), "wrong type"),
        (lambda body: body.update(ranking=[[0, 1.5]]), "wrong type"),
        (lambda body: body.update(scores={"needles": [1, 2]}), "wrong type"),
        (lambda body: body.update(scores=[]), "wrong type"),
    ],
)
def test_invalid_files_are_refused_by_name(tmp_path, edit, message):
    body = tiny_map().to_dict()
    edit(body)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(body))
    with pytest.raises(HydraError, match=message) as error:
        HeadMap.load(path)
    assert "bad.json" in str(error.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(HydraError, match=r"none\.json does not exist"):
        HeadMap.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": "hydra')
    with pytest.raises(HydraError, match=r"half\.json is not valid JSON"):
        HeadMap.load(tmp_path / "half.json")


def test_an_unwritable_map_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HydraError, match=r"map\.json cannot be written"):
        tiny_map().save(tmp_path / "file" / "map.json")
    (tmp_path / "map.json").mkdir()
    with pytest.raises(HydraError, match=r"map\.json cannot be written"):
        tiny_map().save(tmp_path / "map.json")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "map.json"}


@pytest.mark.parametrize(
    "field",
    ["family", "num_layers", "num_query_heads", "num_kv_heads", "head_dim", "hidden_size"],
)
def test_a_map_of_another_model_is_refused(field):
    value = "llama" if field == "family" else getattr(MODEL, field) * 2
    with pytest.raises(HydraError, match=f"its {field} is"):
        tiny_map().check_model(dataclasses.replace(MODEL, **{field: value}))


def test_other_weights_are_refused_and_unknown_ones_are_not():
    with pytest.raises(HydraError, match="other weights"):
        tiny_map().check_model(dataclasses.replace(MODEL, fingerprint="sha256:def"))
    tiny_map().check_model(dataclasses.replace(MODEL, fingerprint="", name="elsewhere"))


def test_ratios():
    assert parse_ratio("7:1") == 7
    assert num_full_attention_heads(28, 16, "7:1") == 56
    assert num_full_attention_heads(4, 8, "7:1") == 4
    assert num_full_attention_heads(1, 4, "15:1") == 1
    assert num_full_attention_heads(4, 8, "all-gdn") == 0
    assert num_full_attention_heads(4, 8, "dense") == 32


def test_a_map_of_given_heads():
    made = HeadMap.of_heads(MODEL, [(1, 3), (0, 1), (1, 0)], "given")
    assert made.full_attention_heads == ((1,), (0, 3))
    assert (made.ratio, made.strategy, made.num_full_attention) == ("2:1", "given", 3)
    everything = [(layer, head) for layer in range(2) for head in range(4)]
    assert HeadMap.of_heads(MODEL, everything, "given").ratio == "dense"
    for heads, message in (
        ([], "no head"),
        ([(0, 1), (0, 1)], r"0\.1 is given twice"),
        ([(2, 0)], r"layer 2 does not exist.*0\.\.1"),
        ([(0, 4)], "head 4 does not exist"),
    ):
        with pytest.raises(HydraError, match=message):
            HeadMap.of_heads(MODEL, heads, "given")
