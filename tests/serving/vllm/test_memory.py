"""What vLLM reserves: keys and values of FA heads only, and a state of fixed size a sequence."""

from __future__ import annotations

import pytest

from tests.serving.vllm import engines

engines.need_vllm()

BYTES = 4  # fp32
MAPS = {
    "uneven": engines.UNEVEN,
    "even": [[1], [2], [3], [4]],
    "most layers without": [[0, 1, 2], [], [], []],
}


def _groups(llm):
    core = llm.llm_engine.engine_core.engine_core
    return core.scheduler.kv_cache_config


@pytest.mark.parametrize("name", MAPS)
def test_bytes_of_a_token(name, tmp_path):
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    engines.save_export(tmp_path, MAPS[name])
    with engines.engine(tmp_path) as llm:
        config = _groups(llm)
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        attention = [g for g in config.kv_cache_groups if isinstance(g.kv_cache_spec, FullAttentionSpec)]
        states = [g for g in config.kv_cache_groups if isinstance(g.kv_cache_spec, MambaSpec)]
        per_token = sum(
            len(g.layer_names) * g.kv_cache_spec.page_size_bytes / g.kv_cache_spec.block_size
            for g in attention
        )
        # Keys and values, of the KV groups that have an FA head.
        kv_heads = sum(len({head // 2 for head in layer}) for layer in MAPS[name])
        assert per_token == kv_heads * 2 * engines.SHAPE["head_dim"] * BYTES
        assert sum(len(g.layer_names) for g in states) == len([x for x in MAPS[name] if len(x) < 6])
        # The pages that exist: a block of every group has as many as the largest group has layers.
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
            for g in _groups(llm).kv_cache_groups
            if isinstance(g.kv_cache_spec, MambaSpec)
        }
    (spec,) = specs
    d = engines.SHAPE["head_dim"]
    assert sorted(spec.shapes, key=len) == [(3, 3 * 6 * d), (6, d, d)]  # the layer without FA heads
