"""Model FLOPs against torch's own counter and against counts by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_hydra.config.model import HydraConfig
from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.model.head_flops import full_attention_flops
from megatron_hydra.ops.linear_rules import gated_delta_net_flops
from megatron_hydra.training.flops import (
    attention_pairs,
    forward_flops,
    peak_tflops,
    step_flops,
)
from tests.training import tiny

TOKENS = 96


def _pairs(length: int = TOKENS) -> float:
    return length * (length + 1) / 2


def test_pairs_stay_inside_documents() -> None:
    tokens = torch.zeros(10, dtype=torch.int64)
    batch = PackedBatch(tokens, tokens, torch.ones(10), (0, 4, 10))
    assert attention_pairs([batch, batch]) == 2 * (10 + 21)


def test_projections_of_the_dense_model_are_those_that_torch_counts(one_rank: None) -> None:
    """torch counts full matrices in attention, so the test compares this part separately."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = tiny.TEACHER
    peer = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=model.vocab_size, hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size, num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_query_heads, num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim, tie_word_embeddings=True, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        peer(torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False)
    heads = model.num_layers * model.num_query_heads
    full_matrices = 4 * model.head_dim * TOKENS**2 * heads
    ours = forward_flops(model, TOKENS, _pairs())
    causal = full_attention_flops(TOKENS, model.head_dim) * heads
    assert counter.get_total_flops() - full_matrices == ours - causal


def test_a_hybrid_counts_each_head_by_its_branch() -> None:
    model = tiny.student_config(tiny.DEEP)
    dense = dataclasses.replace(model, full_attention_heads=(tuple(range(8)),) * 4)
    none = dataclasses.replace(model, full_attention_heads=((),) * 4)
    per_fa = full_attention_flops(TOKENS, model.head_dim)
    fa_heads = sum(map(len, tiny.HEADS))

    def cores(which: object) -> float:
        return forward_flops(which, TOKENS, _pairs()) - forward_flops(which, TOKENS, 0)

    assert cores(model) == fa_heads * per_fa
    assert cores(dense) == 32 * per_fa
    assert cores(none) == 0
    recurrence = gated_delta_net_flops(TOKENS, model.head_dim) * 32
    assert recurrence < forward_flops(none, TOKENS, 0)


def test_biases_and_kernels_multiply_no_token() -> None:
    plain = tiny.student_config(short_conv=False)
    model = dataclasses.replace(tiny.student_config(), qkv_bias=True)
    assert forward_flops(model, TOKENS, 0) == forward_flops(plain, TOKENS, 0)


def test_a_step_of_each_verb() -> None:
    student, teacher = tiny.student_config(), tiny.TEACHER
    both = [forward_flops(m, TOKENS, _pairs()) for m in (student, teacher)]
    assert step_flops("finetune", student, None, TOKENS, _pairs()) == 3 * both[0]
    assert step_flops("distill", student, teacher, TOKENS, _pairs()) == 3 * both[0] + both[1]
    align = step_flops("align", student, teacher, TOKENS, _pairs())
    head = 2 * TOKENS * teacher.vocab_size * teacher.hidden_size
    mlp = 2 * TOKENS * 3 * student.ffn_hidden_size * student.hidden_size * student.num_layers
    assert align == 3 * (both[0] - head - mlp) + both[1] - head


def test_an_untied_table_is_looked_up_and_not_multiplied() -> None:
    tied, untied = (
        forward_flops(dataclasses.replace(tiny.TEACHER, tie_embeddings=tie), TOKENS, 0)
        for tie in (True, False)
    )
    assert tied == untied


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H20", 148.0), ("NVIDIA H200", 989.0), ("x", 0.0)],
)
def test_peaks(name: str, peak: float) -> None:
    assert peak_tflops(name) == peak


def test_switches_do_not_break_the_count() -> None:
    model = tiny.student_config(gdn_kv="gqa")
    assert isinstance(model.hydra, HydraConfig)
    assert forward_flops(model, TOKENS, _pairs()) < forward_flops(
        tiny.student_config(), TOKENS, _pairs()
    )
