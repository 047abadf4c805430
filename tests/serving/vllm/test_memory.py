"""Memory that vLLM reserves: keys and values of FA heads only, and a fixed state for each sequence."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
from tests.serving.vllm import engines

engines.need_vllm()

BYTES = 4  # fp32
MAPS = {
    "uneven": engines.UNEVEN,
    "even": [[1], [2], [3], [4]],
    "most layers without": [[0, 1, 2], [], [], []],
}


@pytest.mark.parametrize("name", MAPS)
def test_bytes_of_a_token(name, tmp_path):
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    engines.save_export(tmp_path, MAPS[name])
    with engines.engine(tmp_path) as llm:
        config = engines.cache_config(llm)
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        attention = [
            g for g in config.kv_cache_groups if isinstance(g.kv_cache_spec, FullAttentionSpec)
        ]
        states = [g for g in config.kv_cache_groups if isinstance(g.kv_cache_spec, MambaSpec)]
        per_token = sum(
            len(g.layer_names) * g.kv_cache_spec.page_size_bytes / g.kv_cache_spec.block_size
            for g in attention
        )
        # Keys and values of the KV groups that have an FA head.
        kv_heads = sum(len({head // 2 for head in layer}) for layer in MAPS[name])
        assert per_token == kv_heads * 2 * engines.SHAPE["head_dim"] * BYTES
        assert sum(len(g.layer_names) for g in states) == len([x for x in MAPS[name] if len(x) < 6])
        # Existing pages: a block of every group has as many pages as the largest group has layers.
        widest = max(len(g.layer_names) for g in config.kv_cache_groups)
        page = config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
        allocated = {tensor.size for tensor in config.kv_cache_tensors}  # all are views of one
        assert allocated == {config.num_blocks * widest * page}
        for group in attention:
            for layer in group.layer_names:
                cache = layers[layer].kv_cache
                assert cache.numel() * cache.element_size() == config.num_blocks * page


def test_states_are_those_of_the_largest_layer(tmp_path):
    from vllm.v1.kv_cache_interface import MambaSpec

    engines.save_export(tmp_path)
    with engines.engine(tmp_path) as llm:
        specs = {
            g.kv_cache_spec
            for g in engines.cache_config(llm).kv_cache_groups
            if isinstance(g.kv_cache_spec, MambaSpec)
        }
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        parts = [
            len(groups)
            for groups in worker.model_runner.attn_groups
            if isinstance(groups[0].kv_cache_spec, MambaSpec)
        ]
    assert parts and set(parts) == {1}  # layers share it, whatever their numbers of heads
    (spec,) = specs
    d = engines.SHAPE["head_dim"]
    assert sorted(spec.shapes, key=len) == [(3, 3 * 6 * d), (6, d, d)]  # the layer without FA heads


@pytest.mark.parametrize(
    "hydra", [{}, {"short_conv": False}, {"conv_width": 1}, {"conv_width": 2}], ids=str
)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_16_bit_state_leaves_the_fp32_state_behind_it_aligned(hydra, tp_size):
    """vLLM reads both states of a page from its bytes, one behind the other."""
    from megatron_hydra.serving.vllm.gated_delta_net import state_shapes

    heads = [list(layer) for layer in engines.UNEVEN]
    config = HydraHeadConfig(
        **engines.SHAPE, num_hidden_layers=len(heads), full_attention_heads=heads, hydra=hydra
    )
    convolution, _ = state_shapes(config, tp_size)
    assert math.prod(convolution) * 2 % BYTES == 0


def test_what_a_long_sequence_takes_at_the_shape_of_qwen3_1_7b(tmp_path):
    """56 FA heads over 28 layers in bf16: little more than FA heads and states need, in whole pages."""
    import random

    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    layers, heads, d, tokens = 28, 16, 128, 32768
    every = [(layer, head) for layer in range(layers) for head in range(heads)]
    chosen = random.Random(0).sample(every, len(every) // 8)
    fa = [sorted(h for layer, h in chosen if layer == index) for index in range(layers)]
    shape = {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": d}
    engines.save_export(
        tmp_path, fa, torch.bfloat16, **shape, max_position_embeddings=tokens, vocab_size=64
    )
    options = {"dtype": "bfloat16", "max_model_len": tokens, "enable_prefix_caching": False}
    with engines.engine(tmp_path, **options) as llm:
        cache = engines.cache_config(llm)
        together = get_max_concurrency_for_kv_cache_config(llm.llm_engine.vllm_config, cache)
        taken = cache.kv_cache_tensors[0].size / together
    kv_heads = len({(layer, head // 2) for layer, head in chosen})
    keys = kv_heads * 2 * d * 2 * tokens
    states = sum((16 - len(f)) * (d * d * 4 + 3 * 3 * d * 2) for f in fa)
    dense = layers * 8 * 2 * d * 2 * tokens
    print(
        f"{taken / (keys + states):.3f} of what is needed, {dense / taken:.2f} times fewer than dense"
    )
    assert keys + states <= taken < 1.25 * (keys + states)
