"""If vLLM cannot serve an export, it shows the plug-in's own error."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving.vllm import engines

engines.need_vllm()

from megatron_hydra.errors import HydraError  # noqa: E402  (after vLLM is known to be there)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    engines.save_export(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quantization": "fp8"}, "--quantization fp8"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"runner": "pooling"}, "--runner pooling"),
        ({"enable_lora": True}, "--enable-lora"),
        pytest.param(
            {"tensor_parallel_size": 4},
            "--tensor-parallel-size 4",
            marks=pytest.mark.skipif(
                0 < torch.cuda.device_count() < 4, reason="vLLM itself asks for four GPUs first"
            ),
        ),
        ({"additional_config": {"hydrahead_tuning": "never"}}, "hydrahead_tuning='never'"),
    ],
)
def test_options(export, options, named):
    with pytest.raises(Exception, match=named), engines.engine(export, **options):
        pass


def test_mixer(tmp_path):
    engines.save_export(tmp_path, [list(range(6))] * 2, hydra={"mixer": "token", "window": 8})
    with pytest.raises(Exception, match=r"hydra\.mixer='token'"), engines.engine(tmp_path):
        pass


@pytest.mark.parametrize(
    "name", ["model.layers.3.self_attn.gamma", "model.layers.0.mlp.up_proj.weight"]
)
def test_tensors_that_do_not_fit(tmp_path, name):
    engines.save_export(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    whole = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(HydraError, match=f"no tensor {name}"), engines.engine(tmp_path):
        pass
    tensors |= {name: whole, "model.layers.0.self_attn.other": whole.clone()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(HydraError, match=r"a tensor .*self_attn\.other"), engines.engine(tmp_path):
        pass


def test_a_switch_that_is_unknown(tmp_path):
    engines.save_export(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["hydra"]["new_switch"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"hydra\.new_switch is unknown"), engines.engine(tmp_path):
        pass
