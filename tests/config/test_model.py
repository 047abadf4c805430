"""The model config: the kind of every head, and the combinations that are refused."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_hydra.config.loading import apply_overrides
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import HeadMap

DENSE = ModelConfig(
    family="qwen3", num_layers=2, hidden_size=32, ffn_hidden_size=48, vocab_size=64,
    num_query_heads=4, num_kv_heads=2, head_dim=8,
)  # fmt: skip
EVERY = (0, 1, 2, 3)


def head_map(**changes) -> HeadMap:
    fields = {
        "model": DENSE.identity(), "full_attention_heads": ((0, 1), ()), "strategy": "random",
        "ratio": "3:1",
    } | changes  # fmt: skip
    return HeadMap(**fields)


@pytest.mark.parametrize("mixer", ["token", "parallel"])
def test_every_head_is_both_without_a_map(mixer):
    model = DENSE.with_every_head_mixed(HydraConfig(mixer=mixer))
    assert model.is_hybrid and model.head_map is None
    for layer in range(2):
        assert model.fa_heads(layer) == model.gdn_heads(layer) == EVERY
    assert model.dense() == DENSE


def test_a_head_is_one_kind_where_a_map_decides():
    model = DENSE.with_head_map(head_map(), HydraConfig())
    assert [model.fa_heads(layer) for layer in range(2)] == [(0, 1), ()]
    assert [model.gdn_heads(layer) for layer in range(2)] == [(2, 3), EVERY]


def test_a_mixer_in_every_head_refuses_a_head_map():
    with pytest.raises(HydraError, match=r"mixer=token .* leave the head map out"):
        DENSE.with_head_map(head_map(), HydraConfig(mixer="token"))
    with pytest.raises(HydraError, match="a head map is missing"):
        DENSE.with_every_head_mixed(HydraConfig())
    with pytest.raises(HydraError, match=r"mixer=parallel .*does not list every head"):
        dataclasses.replace(
            DENSE, hydra=HydraConfig(mixer="parallel"), full_attention_heads=(EVERY, (0, 1, 2))
        )


def test_granularity_of_the_map_becomes_that_of_the_model():
    groups = head_map(granularity="kv_group")
    wanted = HydraConfig(granularity="kv_group")
    assert DENSE.with_head_map(groups, wanted).switches.granularity == "kv_group"
    assert DENSE.with_head_map(groups, HydraConfig()).switches.granularity == "kv_group"
    with pytest.raises(HydraError, match="granularity is kv_group"):
        DENSE.with_head_map(head_map(), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "hydra.window is 0"),
        ({"conv_width": 0}, "hydra.conv_width is 0"),
        ({"log_scale_a": 1.0}, "hydra.log_scale_a is 1.0"),
        ({"fa_rotary_every": -1}, "hydra.fa_rotary_every is -1"),
    ],
)
def test_switches_that_do_not_exist(changes, message):
    with pytest.raises(HydraError, match=message):
        HydraConfig(**changes)


ABLATIONS = {  # rows of the paper's tables: the switches that differ from HydraHead's defaults
    "gated fusion": ["fusion=gated"],
    "direct concatenation": ["fusion=concat"],
    "no feature normalisation": ["fusion_norm=none"],
    "FA rotary": ["fa_position=rope"],
    "FA log scale and rotary": ["fa_position=both"],
    "FA without position": ["fa_position=none"],
    "FA rotary in every second layer": ["fa_rotary_every=2"],
    "another log scale": ["log_scale_a=50"],
    "no FA gate": ["fa_gate=false"],
    "FA gate without bias": ["fa_gate_bias=false"],
    "GDN without position": ["gdn_position=none"],
    "log scale in the finished model only": ["log_scale=final"],
    "no GDN gate": ["gdn_gate=false"],
    "KDA in place of GDN": ["linear=kda"],
    "shared QKV": ["qkv=shared"],
    "GDN-GQA": ["gdn_kv=gqa"],
    "KV groups": ["granularity=kv_group"],
    "no short convolution": ["short_conv=false"],
    "a wider convolution": ["conv_width=8"],
    "token-wise hybrid": ["mixer=token", "window=64"],
    "head-wise mixing": ["mixer=parallel"],
}


@pytest.mark.parametrize("row", ABLATIONS)
def test_an_ablation_is_a_switch(row):
    """As ``tools/hf_to_megatron.py --set`` and an experiment's ``hydra:`` do; no other switch changes."""
    changed = apply_overrides(HydraConfig(), ABLATIONS[row])
    before, after = vars(HydraConfig()), vars(changed)
    named = {override.partition("=")[0] for override in ABLATIONS[row]}
    assert {key for key in after if after[key] != before[key]} == named


def test_every_switch_is_a_row():
    named = {o.partition("=")[0] for overrides in ABLATIONS.values() for o in overrides}
    assert named == set(vars(HydraConfig()))
