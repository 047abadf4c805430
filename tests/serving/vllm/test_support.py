"""Unsupported features are refused by name, before any weight is read."""

from __future__ import annotations

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.hf.configuration_hydrahead import SWITCHES, HydraHeadConfig
from megatron_hydra.serving.vllm import support

OPTIONS = {
    "quantization": None,
    "speculative": False,
    "lora": False,
    "kv_cache_dtype": "auto",
    "decode_context_parallel": 1,
    "prefill_context_parallel": 1,
    "runner": "generate",
}


def config(**changes):
    return HydraHeadConfig(
        num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, **changes
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hydra": {"mixer": "token"}}, "hydra.mixer='token' in config.json"),
        ({"hydra": {"mixer": "parallel"}}, "hydra.mixer='parallel' in config.json"),
        ({"hydra": {"linear": "kda"}}, "hydra.linear='kda' in config.json"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' in config.json"),
    ],
)
def test_models(changes, named):
    with pytest.raises(HydraError, match=named):
        support.check_model(config(**changes))


def test_a_switch_that_the_plug_in_does_not_know_is_refused(monkeypatch):
    monkeypatch.setitem(SWITCHES, "gdn_input_gate", (False, (True, False)))
    support.check_model(config())
    with pytest.raises(HydraError, match=r"hydra\.gdn_input_gate=True in config\.json"):
        support.check_model(config(hydra={"gdn_input_gate": True}))


def test_supported():
    support.check_model(config())
    support.check_tensor_parallel(config(), 3)
    support.check_options(**OPTIONS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantization": "fp8"}, "--quantization fp8"),
        ({"speculative": True}, "--speculative-config"),
        ({"lora": True}, "--enable-lora"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"decode_context_parallel": 2}, "--decode-context-parallel-size 2"),
        ({"prefill_context_parallel": 2}, "--prefill-context-parallel-size 2"),
        ({"runner": "pooling"}, "--runner pooling"),
    ],
)
def test_options(changes, named):
    with pytest.raises(HydraError, match=f"{named} is not supported"):
        support.check_options(**{**OPTIONS, **changes})


@pytest.mark.parametrize(
    ("changes", "size", "named"),
    [({}, 4, "num_attention_heads=6"), ({"intermediate_size": 100}, 3, "intermediate_size=100")],
)
def test_tensor_parallel(changes, size, named):
    with pytest.raises(HydraError, match=f"--tensor-parallel-size {size} does not divide {named}"):
        support.check_tensor_parallel(config(**changes), size)
