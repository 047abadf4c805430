"""Half-lives and write strengths from the teacher's attention, measured on planted heads."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_hydra.checkpoint.canonical import canonical_shapes
from megatron_hydra.conversion.student import StudentInit, initialise_student
from megatron_hydra.conversion.teacher_statistics import (
    HeadStatistics,
    _Distances,
    mean_distances,
    measure_heads,
)
from megatron_hydra.errors import HydraError
from tests.checkpoint.models import hybrid_config, random_state

HEADS, D, HIDDEN, VOCABULARY = 4, 32, 48, 40
RANGE = (1.0, 4096.0)
MARKED = 7
"""The token that head 3 attends to, at any position."""


def planted(lookback: int) -> Qwen2ForCausalLM:
    """Four heads that attend: ``lookback`` tokens back; to their own token; to all alike; to MARKED.

    Queries and keys are constants (biases), which rotary embedding turns into a function of distance.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=D, max_position_embeddings=512,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    attention = model.model.layers[0].self_attn
    d = attention.head_dim
    theta = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, d, 2) / d)
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        for head, distance in ((0, lookback), (1, 0)):
            rows = slice(head * d, (head + 1) * d)
            attention.k_proj.bias[rows] = 20.0
            # A key Δ tokens back has the score Σ cos((Δ − distance) θ), which is highest at Δ = distance.
            angle = -distance * theta
            turned = torch.cat((angle.cos() - angle.sin(), angle.cos() + angle.sin()))
            attention.q_proj.bias[rows] = 20.0 * turned
        rows = slice(3 * d, 4 * d)  # only slow channels, which rotary hardly changes
        slow = torch.zeros(d)
        slow[d // 2 - 1] = 1.0
        direction = torch.nn.functional.normalize(torch.randn(HIDDEN), dim=0)
        model.model.embed_tokens.weight.copy_(0.1 * torch.randn(VOCABULARY, HIDDEN))
        others = model.model.embed_tokens.weight
        others -= (others @ direction)[:, None] * direction
        model.model.embed_tokens.weight[MARKED] = direction
        attention.k_proj.weight[rows] = 5.0 * slow[:, None] * direction
        attention.q_proj.bias[rows] = 5.0 * slow
    return model


def text(batch: int = 4, length: int = 256) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(8, VOCABULARY, (batch, length), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.1] = MARKED
    return list(tokens.split(1))


@pytest.mark.parametrize("lookback", [3, 12])
def test_a_planted_head_of_known_lookback_gets_its_half_life(lookback: int) -> None:
    model = planted(lookback)
    measured = measure_heads(model, text(), RANGE)
    life, distance = measured.half_life[0], measured.distance[0]
    assert distance[0] == pytest.approx(lookback, rel=0.1)
    assert life[0] == pytest.approx(math.log(2) / math.log1p(1 / lookback), rel=0.1)
    assert life[1] == pytest.approx(RANGE[0])  # attends to no earlier token
    assert life[2] > 1000 and life[3] > 50  # attends to near and far tokens alike
    assert model.config._attn_implementation == "sdpa"  # unchanged


def test_a_head_that_attends_to_a_token_writes_that_token() -> None:
    model, tokens = planted(3), text()
    write = measure_heads(model, tokens, RANGE).write[0]
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.cat(tokens)))
    beta = torch.sigmoid(x @ write.T)[:, 1:].detach()
    marked = torch.cat(tokens)[:, 1:] == MARKED
    assert float(beta[marked][:, 3].min()) > 0.75
    assert float(beta[~marked][:, 3].mean()) < 0.25
    for head in (0, 1, 2):  # distance explains what these heads attend to
        assert float((beta[..., head] - 0.5).abs().mean()) < 0.1


@pytest.mark.parametrize("half_life", [1.5, 20.0, 700.0])
def test_exponential_attention_is_read_back_whatever_the_lengths(half_life: float) -> None:
    look = _Distances()
    for length in (40, 200, 90):
        distance = torch.arange(length)[:, None] - torch.arange(length)
        weights = torch.exp2(-distance.double() / half_life).masked_fill(distance < 0, 0)
        weights[:, 0] = 0
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
        # Half of every query's attention goes to the first token.
        weights = 0.5 * weights
        weights[:, 0] += 0.5
        look.add(weights.expand(1, 2, length, length))
    assert look.half_life(*RANGE).tolist() == pytest.approx([half_life] * 2, rel=0.01)


def test_mean_distance_on_an_endless_text_is_that_of_the_decay() -> None:
    decay = 2 ** (-1 / 10)
    (means,) = mean_distances(torch.tensor([10.0], dtype=torch.float64), 500)
    assert float(means[-1]) == pytest.approx(decay / (1 - decay), rel=1e-6)
    assert means[0] == 0 and float(means[1]) == pytest.approx(decay / (1 + decay))


def test_a_head_that_attends_to_the_first_token_never_forgets() -> None:
    look = _Distances()
    weights = torch.zeros(1, 1, 30, 30)
    weights[..., 0] = 1
    look.add(weights)
    assert look.half_life(*RANGE).tolist() == [pytest.approx(RANGE[1])]


def test_the_student_begins_as_measured() -> None:
    model = hybrid_config()
    layers, heads = model.num_layers, model.num_query_heads
    life = torch.arange(1.0, layers * heads + 1, dtype=torch.float64).view(layers, heads)
    write = torch.randn(layers, heads, model.hidden_size)
    statistics = HeadStatistics(life, write, life)
    dense = random_state(canonical_shapes(model.dense()))
    init = StudentInit(kind="statistics")
    made = initialise_student(dense, model, init=init, statistics=statistics)
    decays_only = initialise_student(
        dense, model, init=StudentInit(kind="decay"), statistics=statistics
    )
    for layer in (0, 1, 3):  # layer 2 has no GDN head
        chosen = list(model.gdn_heads(layer))
        prefix = f"decoder.layers.{layer}.self_attention."
        decay = torch.exp(-torch.nn.functional.softplus(made[prefix + "gdn.dt_bias"].double()))
        torch.testing.assert_close(decay ** life[layer, chosen], torch.full_like(decay, 0.5))
        assert torch.equal(made[prefix + "in.gdn.b"], write[layer, chosen])
        assert torch.equal(decays_only[prefix + "gdn.dt_bias"], made[prefix + "gdn.dt_bias"])
        assert not decays_only[prefix + "in.gdn.b"].any()
    with pytest.raises(HydraError, match="statistics of the teacher's heads are missing"):
        initialise_student(dense, model, init=init)
    with pytest.raises(HydraError, match="are given"):
        initialise_student(dense, model, statistics=statistics)


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(HydraError, match=r"three tokens.*--calibration-file"):
        measure_heads(planted(3), [torch.zeros(1, 2, dtype=torch.int64)], RANGE)
