"""The student: every tensor comes from the teacher or has a defined start value."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import softplus

from megatron_hydra.checkpoint.canonical import canonical_shapes, is_fp32
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.conversion import student
from megatron_hydra.conversion.calibration import calibration_batches
from megatron_hydra.conversion.student import StudentInit, calibrate_gamma, initialise_student
from megatron_hydra.errors import HydraError
from tests.checkpoint.models import FULL_ATTENTION_HEADS, VARIANTS, hybrid_config, random_state

FIRST, LAST = "decoder.layers.0.self_attention.", "decoder.layers.3.self_attention."


def make(gamma=None, seed=0, init=None, dtype=torch.float32, **changes):
    model = hybrid_config(**changes)
    state = random_state(canonical_shapes(model.dense()))
    dense = {key: tensor.to(dtype) for key, tensor in state.items()}
    return model, dense, initialise_student(dense, model, gamma, seed, init)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("fusion", ["scale", "gated", "concat"])
def test_every_tensor_is_made_in_its_shape_and_dtype(family, fusion):
    model, _, made = make(
        family=family,
        dtype=torch.bfloat16,
        hydra=HydraConfig(fusion=fusion),
        qkv_bias=family == "qwen2",
        out_bias=family == "llama",
    )
    assert {key: tuple(tensor.shape) for key, tensor in made.items()} == canonical_shapes(model)
    for key, tensor in made.items():
        assert tensor.dtype == made.describe(key).dtype
        assert tensor.dtype == (torch.float32 if is_fp32(key) else torch.bfloat16)


def test_query_heads_go_to_their_branch_and_keep_their_weights():
    _, dense, made = make()
    q = dense[LAST + "in.fa.q"]  # layer 3: FA heads 0, 2, 3
    assert torch.equal(made[LAST + "in.fa.q"], q[[0, 2, 3]])
    assert torch.equal(made[LAST + "in.gdn.q"], q[[1]])


@pytest.mark.parametrize("part", ["k", "v"])
def test_key_value_heads_follow_their_group(part):
    _, dense, made = make(qkv_bias=True)
    for group in ("in", "in_bias"):
        source = dense[f"{FIRST}{group}.fa.{part}"]  # layer 0: FA head 2 (group 1)
        assert torch.equal(made[f"{FIRST}{group}.fa.{part}"], source[[1]])
        assert torch.equal(made[f"{FIRST}{group}.gdn.{part}"], source[[0, 0, 1]])


def test_gqa_shares_instead_of_repeating():
    _, dense, made = make(hydra=HydraConfig(gdn_kv="gqa"))
    assert torch.equal(made[FIRST + "in.gdn.k"], dense[FIRST + "in.fa.k"])


@pytest.mark.parametrize("gdn_kv", ["mha", "gqa"])
def test_shared_qkv_keeps_the_teachers_groups_and_norms(gdn_kv):
    _, dense, made = make(hydra=HydraConfig(qkv="shared", gdn_kv=gdn_kv), qkv_bias=True)
    for prefix in (FIRST, LAST):
        for name in ("in.{}k", "in.{}v", "in_bias.{}k", "in_bias.{}v", "{}q_norm", "{}k_norm"):
            assert torch.equal(made[prefix + name.format("")], dense[prefix + name.format("fa.")])
    assert torch.equal(made[LAST + "in.gdn.q"], dense[LAST + "in.fa.q"][[1]])


def test_the_backbone_is_the_teachers():
    _, dense, made = make()
    shared = set(dense) & set(made)
    backbone = [key for key in shared if "self_attention.in" not in key]
    assert LAST + "out" in backbone and "output_layer.weight" in backbone
    assert all(torch.equal(made[key], dense[key]) for key in backbone)


def test_qk_norms_are_in_both_branches():
    _, dense, made = make()
    for name in ("q_norm", "k_norm"):
        for branch in ("fa", "gdn"):
            assert torch.equal(made[f"{LAST}{branch}.{name}"], dense[f"{LAST}fa.{name}"])


def test_new_parameters_start_without_effect():
    _, _, made = make(hydra=HydraConfig(fusion="gated"))
    for name in ("in.fa.gate", "in.gdn.gate", "in.gdn.a", "in.gdn.b", "fusion_gate"):
        assert not made[LAST + name].any()
    assert torch.equal(made[LAST + "in_bias.fa.gate"], torch.ones(3, 16))
    kernel = made[FIRST + "gdn.conv_k"]
    assert torch.equal(kernel, torch.tensor([0.0, 0, 0, 1]).expand_as(kernel))


def test_a_gate_without_a_later_norm_starts_at_one():
    _, _, made = make(hydra=HydraConfig(fusion_norm="none"))
    assert not made[LAST + "in_bias.fa.gate"].any()  # 2σ(0) = 1
    _, _, made = make(hydra=HydraConfig(fa_gate_bias=False))
    assert LAST + "in_bias.fa.gate" not in made


def test_gamma_is_the_given_one():
    gamma = torch.rand(4, 4)
    _, _, made = make(gamma)
    assert torch.equal(made[LAST + "gamma"], gamma[3])
    _, _, ones = make()
    assert torch.equal(ones[LAST + "gamma"], torch.ones(4))


def test_without_a_norm_gamma_is_one():
    _, _, made = make(torch.rand(4, 4), hydra=HydraConfig(fusion_norm="none"))
    assert torch.equal(made[LAST + "gamma"], torch.ones(4))


def test_a_normalised_concat_carries_gamma_in_the_output_projection():
    gamma = torch.rand(4, 4)
    _, dense, made = make(gamma, hydra=HydraConfig(fusion="concat"))
    torch.testing.assert_close(made[LAST + "out"][2], dense[LAST + "out"][2] * gamma[3, 2])
    _, dense, made = make(gamma, hydra=HydraConfig(fusion="concat", fusion_norm="none"))
    assert torch.equal(made[LAST + "out"], dense[LAST + "out"])


@pytest.mark.parametrize("mixer", ["token", "parallel"])
def test_heads_that_are_both_begin_as_the_mean_of_two_copies(mixer):
    gamma, every = torch.rand(4, 4), ((0, 1, 2, 3),) * 4
    changes = {"full_attention_heads": every}
    _, dense, made = make(gamma, hydra=HydraConfig(mixer=mixer), **changes)
    for branch in ("fa", "gdn"):
        assert torch.equal(made[f"{FIRST}in.{branch}.q"], dense[FIRST + "in.fa.q"])
        assert torch.equal(made[f"{FIRST}gamma.{branch}"], gamma[0] / 2)
    assert torch.equal(made[FIRST + "in.fa.k"], dense[FIRST + "in.fa.k"])
    assert torch.equal(made[FIRST + "in.gdn.k"], dense[FIRST + "in.fa.k"][[0, 0, 1, 1]])
    assert torch.equal(made[FIRST + "out"], dense[FIRST + "out"])
    for norm in ("rms", "none"):
        plain = HydraConfig(mixer=mixer, fusion="concat", fusion_norm=norm)
        _, dense, made = make(gamma, hydra=plain, **changes)
        factor = gamma[0, :, None, None] / 2 if norm == "rms" else 0.5
        torch.testing.assert_close(made[FIRST + "out"], dense[FIRST + "out"] * factor)


def test_wrong_inputs_are_refused():
    with pytest.raises(HydraError, match=r"gamma has shape \[4, 3\]"):
        make(torch.ones(4, 3))
    model = hybrid_config().dense()
    with pytest.raises(HydraError, match="dense"):
        initialise_student({}, model)
    with pytest.raises(HydraError, match="ascending"):
        StudentInit(64, 32)


# -- decays --------------------------------------------------------------------------------------


def test_half_lives_span_their_range_evenly_in_the_logarithm():
    init = StudentInit(32, 16384)
    lives = student.half_lives(10, 0, 0, init).sort().values
    torch.testing.assert_close(lives[0].item(), 32.0)
    torch.testing.assert_close(lives[-1].item(), 16384.0)
    steps = lives.log().diff()
    torch.testing.assert_close(steps, torch.full_like(steps, math.log(512) / 9))
    middle = student.half_lives(1, 0, 0, init)
    torch.testing.assert_close(middle.item(), math.sqrt(32 * 16384))


def test_decays_halve_the_state_in_a_half_life():
    init = StudentInit(8, 1024)
    _, _, made = make(init=init, seed=5)
    for layer in (0, 1):
        prefix = f"decoder.layers.{layer}.self_attention.gdn."
        log_alpha = -made[prefix + "A_log"].exp() * softplus(made[prefix + "dt_bias"])
        lives = student.half_lives(len(log_alpha), layer, 5, init)
        remaining = (log_alpha.double() * lives).exp()
        torch.testing.assert_close(remaining, torch.full_like(remaining, 0.5), rtol=0, atol=1e-5)


def test_decays_depend_on_layer_and_seed_only():
    key = "decoder.layers.1.self_attention.gdn.dt_bias"
    one, again, other = (make(seed=seed)[2][key] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one.sort().values, other.sort().values)


# -- calibration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_gamma_is_the_rms_of_each_heads_output(variant):
    model_class, config_class, changes = VARIANTS[variant]
    from tests.checkpoint.models import SHAPE

    torch.manual_seed(0)
    model = model_class(config_class(**{**SHAPE, **changes})).eval()
    batches = [torch.randint(61, (2, 9)), torch.randint(61, (1, 5))]
    outputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, seen in zip(model.model.layers, outputs, strict=True):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0])
        )
    gamma = calibrate_gamma(model, batches)
    assert gamma.shape == (4, 4)
    for layer, seen in enumerate(outputs):
        heads = torch.cat([x.reshape(-1, 4, x.shape[-1] // 4) for x in seen])
        expected = heads.square().mean(dim=(0, 2)).sqrt()
        torch.testing.assert_close(gamma[layer], expected.detach(), rtol=1e-5, atol=0)


def test_calibration_refuses_no_tokens_and_broken_models():
    model_class, config_class, changes = VARIANTS["qwen2"]
    from tests.checkpoint.models import SHAPE

    model = model_class(config_class(**{**SHAPE, **changes})).eval()
    with pytest.raises(HydraError, match="no tokens"):
        calibrate_gamma(model, [])
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(HydraError, match="layer 2, head 0 gives values that are not finite"):
        calibrate_gamma(model, [torch.zeros(1, 4, dtype=torch.int64)])


class Words:
    """A tokenizer with one token for each word."""

    def __call__(self, text):
        return {"input_ids": [len(word) for word in text.split()]}


def test_calibration_tokens_come_from_text_and_from_ids(tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "a bb ccc"}\n\n{"input_ids": [7, 8]}\n[9]\n')
    batches = calibration_batches(Words(), 61, lines)
    assert [batch.tolist() for batch in batches] == [[[1, 2, 3]], [[7, 8]], [[9]]]
    assert [b.tolist() for b in calibration_batches(Words(), 61, lines, max_tokens=4)] == [
        [[1, 2, 3]],
        [[7]],
    ]
    text = tmp_path / "text.txt"
    text.write_text("a " * 1500)
    assert [b.shape[1] for b in calibration_batches(Words(), 61, text)] == [1024, 476]
    assert sum(b.numel() for b in calibration_batches(Words(), 61)) > 500  # the bundled text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1 is not valid JSON"),
        ('{"tekst": 1}', "line 1 must be"),
        ("[61]", "token id 61 does not exist"),
        ("", "no tokens"),
    ],
)
def test_bad_calibration_files_are_named(content, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(HydraError, match=rf"bad\.jsonl.*{message}"):
        calibration_batches(Words(), 61, path)


def test_full_attention_heads_of_the_fixture_cover_all_cases():
    sizes = [len(heads) for heads in FULL_ATTENTION_HEADS]
    assert 0 in sizes and 4 in sizes and any(0 < size < 4 for size in sizes)
