"""The Megatron layer compared with independent models: transformers' and the exported one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_hydra.checkpoint.canonical import canonical_shapes
from megatron_hydra.config.model import DENSE_ATTENTION, HydraConfig, ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.conversion import families
from megatron_hydra.conversion.hf_config import hf_config_from_model, model_from_hf_config
from megatron_hydra.conversion.student import initialise_student
from megatron_hydra.model.layer_spec import build_gpt_model
from megatron_hydra.parallel.packed_sequence import PackedSequence
from tests import canonical_access

pytestmark = pytest.mark.usefixtures("one_rank")

DOCUMENTS = (0, 2, 40, 41, 100)


def canonical_of(hf: torch.nn.Module, model: ModelConfig) -> dict[str, torch.Tensor]:
    """The canonical state dict of a transformers model, by the converters' name map."""
    state = hf.state_dict()
    return {
        m.canonical: m.form.to_canonical([state[name] for name in m.hf], m.canonical_shape)
        for m in families.name_map(model)
    }


def randomised(hf: torch.nn.Module) -> torch.nn.Module:
    """Set weights without symmetries, and slow decays."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
            if name.endswith("dt_bias"):
                parameter.sub_(6.0)
    return hf.float().eval()


def logits(gpt: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    packed = PackedSequence(DOCUMENTS)
    positions = packed.positions_local[None]
    return gpt(tokens[None], positions, None, packed_seq_params=packed)[0]


def reference_logits(hf: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of each document alone."""
    pairs = zip(DOCUMENTS, DOCUMENTS[1:], strict=False)
    return torch.cat([hf(tokens[a:b][None], use_cache=False).logits[0] for a, b in pairs])


def check_equal(gpt: torch.nn.Module, hf: torch.nn.Module, model: ModelConfig) -> None:
    """Compare logits and all gradients."""
    tokens = torch.randint(0, model.vocab_size, (DOCUMENTS[-1],))
    ours, theirs = logits(gpt, tokens), reference_logits(hf, tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(theirs)
    (ours * cotangent).sum().backward()
    (theirs * cotangent).sum().backward()
    for parameter in hf.parameters():
        parameter.data = (
            parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        )
    expected = canonical_of(hf, model)
    actual = canonical_access.gather(gpt, lambda p: p.grad)
    largest = max(float(grad.norm()) for grad in expected.values())
    for key, grad in expected.items():
        error = float((actual[key] - grad).norm() / grad.norm().clamp_min(1e-3 * largest))
        assert error < 1e-4, (key, error)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_head_fa_is_the_dense_model(family, tied):
    import transformers

    names = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}
    shape = {
        "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": tied,
    } | ({} if family == "qwen2" else {"head_dim": 16})  # fmt: skip
    config = getattr(transformers, f"{names[family]}Config")(**shape)
    hf = randomised(getattr(transformers, f"{names[family]}ForCausalLM")(config))
    model = model_from_hf_config(config.to_dict())
    gpt = build_gpt_model(model, RunConfig(precision="fp32"))
    canonical_access.load(gpt, canonical_of(hf, model))
    check_equal(gpt, hf, model)


def test_all_fa_hybrid_with_every_switch_off_is_the_teacher():
    """Design §2: with every head FA, rotary, and without gate, log scale, norm and γ."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    hf = randomised(Qwen3ForCausalLM(config))
    dense = model_from_hf_config(config.to_dict())
    every = tuple(tuple(range(6)) for _ in range(2))
    hybrid = dataclasses.replace(dense, hydra=DENSE_ATTENTION, full_attention_heads=every)
    gpt = build_gpt_model(hybrid, RunConfig(precision="fp32"))
    canonical_access.load(gpt, canonical_of(hf, dense))
    check_equal(gpt, hf, dense)


SWITCHES = {
    "default": HydraConfig(),
    "gated": HydraConfig(fusion="gated"),
    "concat": HydraConfig(fusion="concat"),
    "no-norm": HydraConfig(fusion_norm="none"),
    "rope": HydraConfig(fa_position="rope"),
    "both": HydraConfig(fa_position="both"),
    "no-position": HydraConfig(fa_position="none"),
    "rotary-in-the-second-layer": HydraConfig(fa_rotary_every=2),
    "no-fa-gate": HydraConfig(fa_gate=False),
    "fa-gate-without-bias": HydraConfig(fa_gate_bias=False),
    "gdn-without-position": HydraConfig(gdn_position="none"),
    "no-gdn-gate": HydraConfig(gdn_gate=False),
    "gqa": HydraConfig(gdn_kv="gqa"),
    "shared": HydraConfig(qkv="shared"),
    "shared-gqa": HydraConfig(qkv="shared", gdn_kv="gqa"),
    "shared-no-conv": HydraConfig(qkv="shared", short_conv=False),
    "no-conv": HydraConfig(short_conv=False),
    "wide-conv": HydraConfig(conv_width=6, log_scale_a=50.0),
    "kda": HydraConfig(linear="kda"),
    "kda-shared-gqa": HydraConfig(linear="kda", qkv="shared", gdn_kv="gqa"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_equals_the_exported_model(name):
    check_hybrid(SWITCHES[name], ((1, 4), (0, 2, 3)))


BOTH_IN_EVERY_HEAD = {
    "parallel": HydraConfig(mixer="parallel"),
    "parallel-gated-gqa": HydraConfig(mixer="parallel", fusion="gated", gdn_kv="gqa"),
    "parallel-shared": HydraConfig(mixer="parallel", qkv="shared"),
    "parallel-plain": HydraConfig(mixer="parallel", fusion="concat", fusion_norm="none"),
    # shorter than a document, of one token, longer than all documents
    "token": HydraConfig(mixer="token", window=7),
    "token-one": HydraConfig(mixer="token", window=1, fa_position="both"),
    "token-wide": HydraConfig(mixer="token", window=64, log_scale_a=50.0),
    "token-gated-gqa": HydraConfig(mixer="token", window=16, fusion="gated", gdn_kv="gqa"),
    "token-kda": HydraConfig(mixer="token", window=7, linear="kda"),
    "token-shared-gqa": HydraConfig(mixer="token", window=7, qkv="shared", gdn_kv="gqa"),
    "token-plain": HydraConfig(
        mixer="token", window=5, fusion="concat", short_conv=False, fa_position="rope"
    ),
}


@pytest.mark.parametrize("name", BOTH_IN_EVERY_HEAD)
def test_both_in_every_head_equals_the_exported_model(name):
    check_hybrid(BOTH_IN_EVERY_HEAD[name], (tuple(range(6)),) * 2)


def test_both_in_every_head_with_biases_equals_the_exported_model():
    check_hybrid(
        HydraConfig(mixer="token", window=9), (tuple(range(6)),) * 2,
        family="qwen2", qk_norm=False, qkv_bias=True, out_bias=True,
    )  # fmt: skip


@pytest.mark.parametrize("qkv", ["decoupled", "shared"])
@pytest.mark.parametrize("heads", [((), (5,)), (tuple(range(6)), ()), ((), ())])
def test_every_number_of_fa_heads_equals_the_exported_model(heads, qkv):
    check_hybrid(HydraConfig(qkv=qkv), heads)


@pytest.mark.parametrize("qkv", ["decoupled", "shared"])
def test_biases_equal_the_exported_model(qkv):
    check_hybrid(
        HydraConfig(qkv=qkv),
        ((1, 4), (2,)),
        family="qwen2",
        qk_norm=False,
        qkv_bias=True,
        out_bias=True,
    )


def check_hybrid(hydra: HydraConfig, heads: tuple, **changes) -> None:
    from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
    from megatron_hydra.hf.modeling_hydrahead import HydraHeadForCausalLM

    fields = {
        "family": "qwen3", "num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 80,
        "vocab_size": 64, "num_query_heads": 6, "num_kv_heads": 2, "head_dim": 16, "qk_norm": True,
        # a first output near zero would magnify rounding, see tests/parallel/layouts.py
        "norm_eps": 1e-4,
    } | changes  # fmt: skip
    model = ModelConfig(**fields, hydra=hydra, full_attention_heads=heads)
    config = HydraHeadConfig(**hf_config_from_model(model, "float32"))
    torch.manual_seed(3)  # the constructor's random draws must not depend on earlier tests
    hf = randomised(HydraHeadForCausalLM(config))
    gpt = build_gpt_model(model, RunConfig(precision="fp32"))
    canonical_access.load(gpt, canonical_of(hf, model))
    check_equal(gpt, hf, model)


def test_a_permuted_internal_head_order_gives_the_same_output(monkeypatch):
    """o_proj is stored by head, so restoring the original order takes no time in the forward."""
    from megatron_hydra.parallel import head_partition

    model = ModelConfig(
        family="qwen3", num_layers=1, hidden_size=48, ffn_hidden_size=80, vocab_size=64,
        num_query_heads=6, num_kv_heads=2, head_dim=16, qk_norm=True,
        hydra=HydraConfig(), full_attention_heads=((1, 4),),
    )  # fmt: skip
    plain = build_gpt_model(model, RunConfig(precision="fp32"))
    generator = torch.Generator().manual_seed(0)
    from megatron_hydra.checkpoint.canonical import canonical_shapes

    weights = {
        k: torch.randn(s, generator=generator) * 0.2 for k, s in canonical_shapes(model).items()
    }

    shuffled = head_partition.LayerPartition(0, "heads", fa=((4, 1),), gdn=((5, 0, 3, 2),))
    monkeypatch.setattr("megatron_hydra.model.layer_spec.plan_model", lambda *args: (shuffled,))
    permuted = build_gpt_model(model, RunConfig(precision="fp32"))
    for gpt in (plain, permuted):
        canonical_access.load(gpt, weights)
    name = "decoder.layers.0.self_attention.projections.in_proj.weight"
    assert not torch.equal(plain.get_parameter(name), permuted.get_parameter(name))
    tokens = torch.randint(0, 64, (DOCUMENTS[-1],))
    torch.testing.assert_close(
        logits(permuted, tokens), logits(plain, tokens), rtol=1e-5, atol=1e-5
    )


def test_a_kda_student_begins_as_the_gdn_student():
    """Logits and gradients are equal; the gradient of a GDN decay is the sum over KDA's channels."""
    dense = ModelConfig(
        family="qwen3", num_layers=2, hidden_size=48, ffn_hidden_size=80, vocab_size=64,
        num_query_heads=6, num_kv_heads=2, head_dim=16, qk_norm=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(shape, generator=generator) * 0.2
        for key, shape in canonical_shapes(dense).items()
    }
    tokens = torch.randint(0, 64, (DOCUMENTS[-1],))
    results = []
    for linear in ("gdn", "kda"):
        model = dataclasses.replace(
            dense, hydra=HydraConfig(linear=linear), full_attention_heads=((1, 4), (0, 2, 3))
        )
        gpt = build_gpt_model(model, RunConfig(precision="fp32"))
        canonical_access.load(gpt, dict(initialise_student(weights, model)))
        output = logits(gpt, tokens)
        torch.nn.functional.cross_entropy(output, tokens).backward()
        results.append((output.detach(), canonical_access.gather(gpt, lambda p: p.grad)))
    (by_head, expected), (by_channel, actual) = results
    torch.testing.assert_close(by_channel, by_head, rtol=1e-5, atol=1e-5)
    assert actual.keys() == expected.keys()
    for key, gradient in expected.items():
        found = actual[key]
        if key.endswith(("in.gdn.a", "dt_bias")):
            assert found.shape == (gradient.shape[0], 16, *gradient.shape[1:])
            found = found.sum(1)
        assert (found - gradient).norm() <= 1e-4 * gradient.norm(), key
