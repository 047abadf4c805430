from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.cache_bytes import measure_cache_bytes


def test_plain_model():
    config = Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = Qwen3ForCausalLM(config).to(dtype).eval()
        measured = measure_cache_bytes(model, 64)
        assert measured == {"kv_bytes_per_token": 3 * 2 * 2 * 8 * size, "state_bytes": 0}


def test_hybrid_holds_the_kv_of_its_full_attention_heads(model):
    """Layer 0 keeps FA head 1 (one KV group), layer 1 FA heads 2 and 3 (one group): 2 of 4 groups."""
    measured = measure_cache_bytes(model, 64)
    assert measured["kv_bytes_per_token"] == 2 * 2 * 8 * 4
    states = (3 + 2) * (8 * 8 + 3 * 3 * 8) * 4
    lengths = 8  # one counter of 64 bits
    assert measured["state_bytes"] == states + lengths


def test_a_window_longer_than_the_prompts_does_not_count_as_growth():
    """Both layers have a window of 300 tokens, even if ``length`` is shorter."""
    config = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=300,
    )  # fmt: skip
    measured = measure_cache_bytes(MistralForCausalLM(config).eval(), 32)
    assert measured["kv_bytes_per_token"] == 0
    sizes = 2 * 8  # each layer holds its window as a tensor
    assert measured["state_bytes"] == 2 * 300 * 2 * 8 * 4 + sizes


def test_a_model_without_cache_is_refused():
    class NoCache:
        device = torch.device("cpu")

        def get_input_embeddings(self):
            return SimpleNamespace(weight=torch.zeros(9, 1))

        def __call__(self, **_):
            return SimpleNamespace(logits=None)

    with pytest.raises(HydraError, match="NoCache returns no cache"):
        measure_cache_bytes(NoCache(), 8)
    with pytest.raises(HydraError, match="too few"):
        measure_cache_bytes(NoCache(), 1)
