"""Each verb's loss and gradient against the simplest possible computation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import LossConfig, RunConfig
from megatron_hydra.conversion.student import initialise_student
from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.model.forward import final_hidden_states
from megatron_hydra.model.layer_spec import build_gpt_model
from megatron_hydra.ops.linear_distillation_loss import linear_distillation_loss_reference
from megatron_hydra.parallel.world import World
from megatron_hydra.transfer.align import Align
from megatron_hydra.transfer.distill import Distill
from megatron_hydra.transfer.finetune import NextToken
from megatron_hydra.transfer.local_batch import LocalBatch, local_batch, pad_stream
from megatron_hydra.transfer.verb import lm_head_weight
from tests import canonical_access
from tests.training import tiny

pytestmark = pytest.mark.usefixtures("one_rank")

ALONE = World(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, False)
CONFIG = RunConfig(
    precision="fp32", loss=LossConfig(kl_weight=0.7, temperature=2.0, chunk_tokens=7)
)
UNTIED = dataclasses.replace(tiny.TEACHER, tie_embeddings=False, out_bias=True)


def _model(config: ModelConfig, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = build_gpt_model(config, CONFIG)
    canonical_access.load(model, weights)
    return model


def _pair(dense: ModelConfig) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The student and the frozen teacher."""
    weights = tiny.teacher_weights(dense)
    hybrid = tiny.student_config(dense)
    student = _model(hybrid, dict(initialise_student(weights, hybrid)))
    return student, _model(dense, weights).eval().requires_grad_(False)


def _batch(length: int = 40) -> LocalBatch:
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, tiny.VOCABULARY, (2, 40), generator=generator)
    mask = (torch.rand(40, generator=generator) > 0.3).float()
    packed = PackedBatch(tokens, labels, mask, (0, 11, 12, 40), (3, 4))
    return local_batch(packed, ALONE, length)


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dense", [tiny.TEACHER, UNTIED], ids=["tied", "untied"])
def test_distill_is_the_unchunked_loss(dense: ModelConfig) -> None:
    student, teacher = _pair(dense)
    batch = _batch()
    verb = Distill(CONFIG, ALONE, [teacher])
    output, loss_function = verb.forward_step(iter([batch]), student)
    loss, num_tokens, _ = loss_function(output)
    loss.backward()
    got = _gradients(student)

    student.zero_grad()
    hidden = final_hidden_states(student, batch.tokens, batch.packed)[:, 0]
    teacher_hidden = final_hidden_states(teacher, batch.tokens, batch.packed)[:, 0]
    expected = linear_distillation_loss_reference(
        hidden, lm_head_weight(student), batch.labels, batch.loss_mask,
        teacher_hidden=teacher_hidden, teacher_weight=lm_head_weight(teacher),
        kl_weight=0.7, temperature=2.0,
    )  # fmt: skip
    expected.loss.backward()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    assert num_tokens == batch.num_loss_tokens == int(batch.loss_mask.sum())
    torch.testing.assert_close(
        verb.sums.float(), torch.stack([expected.kl, expected.ce, torch.tensor(float(num_tokens))])
    )
    means = (verb.sums[:2] / num_tokens).tolist()
    assert verb.metrics(means)["loss"] == pytest.approx(float(loss / num_tokens), rel=1e-5)
    for name, gradient in _gradients(student).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_next_token_is_cross_entropy_over_the_vocabulary() -> None:
    student, _ = _pair(tiny.TEACHER)
    batch = _batch()
    verb = NextToken(CONFIG, ALONE, [])
    output, loss_function = verb.forward_step(iter([batch]), student)
    loss, _, _ = loss_function(output)
    logits = output[:, 0] @ lm_head_weight(student).t()
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    torch.testing.assert_close(loss, (expected * batch.loss_mask).sum(), rtol=1e-5, atol=0)


def _attention_io(teacher: torch.nn.Module, batch: LocalBatch) -> list[tuple]:
    """Input and output of each attention of the teacher, as copies, because the block adds in place."""
    seen: list[tuple] = []

    def record(_module, args, kwargs, output) -> None:
        result, bias = output
        seen.append((args[0].clone(), (result if bias is None else result + bias).clone()))

    hooks = [
        layer.self_attention.register_forward_hook(record, with_kwargs=True)
        for layer in teacher.decoder.layers
    ]
    final_hidden_states(teacher, batch.tokens, batch.packed)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("dense", [tiny.TEACHER, UNTIED], ids=["tied", "with out_bias"])
def test_align_sums_layerwise_squared_errors_on_the_teachers_stream(dense: ModelConfig) -> None:
    student, teacher = _pair(dense)
    verb = Align(CONFIG, ALONE, [teacher])
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(verb.is_trained(name))
    batch = _batch()
    output, loss_function = verb.forward_step(iter([batch]), student)
    assert not loss_function(output)[0].requires_grad
    got = _gradients(student)

    student.zero_grad()
    total = torch.zeros(())
    for index, (x, target) in enumerate(_attention_io(teacher, batch)):
        out, bias = student.decoder.layers[index].self_attention(x, packed_seq_params=batch.packed)
        out = out if bias is None else out + bias
        per_token = (out - target).square().mean(-1)[:, 0]
        layer_loss = (per_token * batch.loss_mask).sum()
        assert float(verb.sums[index]) == pytest.approx(float(layer_loss), rel=1e-5)
        total = total + layer_loss
    total.backward()
    assert verb.sums[-1] == batch.num_loss_tokens
    expected = _gradients(student)
    assert got.keys() == expected.keys()
    assert all(".self_attention." in name for name in got)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_aligning_a_student_equal_to_the_teacher_has_no_loss() -> None:
    teacher = _model(tiny.TEACHER, tiny.teacher_weights())
    student = _model(tiny.TEACHER, tiny.teacher_weights())
    verb = Align(CONFIG, ALONE, [teacher.requires_grad_(False)])
    verb.forward_step(iter([_batch()]), student)
    assert float(verb.sums[:-1].sum()) < 1e-9


def test_padding_has_no_loss() -> None:
    student, teacher = _pair(tiny.TEACHER)
    sums = []
    for length in (40, 64):
        verb = Distill(CONFIG, ALONE, [teacher])
        output, loss_function = verb.forward_step(iter([_batch(length)]), student)
        loss_function(output)
        sums.append(verb.sums)
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-6, atol=0)


def test_padding_is_a_masked_document_of_its_own() -> None:
    batch = PackedBatch(torch.ones(6).long(), torch.ones(6).long(), torch.ones(6), (0, 2, 6), (9,))
    padded = pad_stream(batch, 8)
    assert padded.cu_seqlens == (0, 2, 6, 8)
    assert padded.loss_mask.tolist() == [1] * 6 + [0] * 2
    assert padded.sample_ids == (9,)
    assert pad_stream(batch, 6) is batch
