"""Padding rows of the vocabulary are never saved and never predicted."""

from __future__ import annotations

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_hydra.checkpoint.sharded import box_of, sharded_tensors
from megatron_hydra.model.layer_spec import build_gpt_model
from megatron_hydra.ops.linear_distillation_loss import (
    linear_distillation_loss,
    linear_distillation_loss_reference,
)
from megatron_hydra.parallel.vocabulary import VocabularyShard
from megatron_hydra.training.model_state import model_state
from megatron_hydra.transfer.answers import likeliest_tokens
from megatron_hydra.transfer.verb import lm_head_weight
from tests import canonical_access
from tests.training import tiny
from tests.transfer.test_verbs import CONFIG


@pytest.mark.parametrize("total", [1, 5, 64, 435, 32001])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_entry_is_on_exactly_one_rank(total: int, ranks: int) -> None:
    shards = [VocabularyShard.of(total, ranks, rank) for rank in range(ranks)]
    assert len({shard.rows for shard in shards}) == 1
    held = [i for shard in shards for i in range(shard.first, shard.first + shard.count)]
    assert held == list(range(total))
    assert {shard.is_padded for shard in shards} == {shards[0].rows * ranks != total}


def test_padded_weights_are_saved_without_padding() -> None:
    """The parts of two ranks cover the tensor; loaded parts have zeros in the padding."""
    table, rows = torch.randn(5, 4), 3
    boxes, back = [], []
    for rank in range(2):
        shard = VocabularyShard.of(5, 2, rank)
        padded = torch.full((rows, 4), 7.0)
        padded[: shard.count] = table[shard.first : shard.first + shard.count]
        entry = ShardedTensor.from_rank_offsets("table", padded, (0, rank, 2), replica_id=(0, 0, 0))
        stored = shard.stored(entry, padded)
        parts = list(sharded_tensors(stored))
        boxes += [box_of(part) for part in parts]
        back.append(stored.merge_fn([part.data for part in parts]))
    assert [(box.offset, box.shape, box.global_shape) for box in boxes] == [
        ((0, 0), (3, 4), (5, 4)),
        ((3, 0), (2, 4), (5, 4)),
    ]
    assert torch.equal(torch.cat(back), torch.cat([table, torch.zeros(1, 4)]))


def test_uneven_parts_of_a_vocabulary_give_the_loss_of_the_whole() -> None:
    hidden, weight, teacher = torch.randn(9, 4), torch.randn(5, 4), torch.randn(5, 4)
    labels, mask = torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 1]), torch.ones(9)
    arguments = {"teacher_hidden": hidden, "kl_weight": 0.5, "temperature": 2.0}
    whole = linear_distillation_loss_reference(
        hidden, weight, labels, mask, teacher_weight=teacher, **arguments
    )
    one = linear_distillation_loss(
        hidden, weight, labels + 7, mask, teacher_weight=teacher, first_label=7, chunk_tokens=4, **arguments
    )  # fmt: skip
    assert one.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)


@pytest.fixture
def padded(one_rank) -> torch.nn.Module:
    """A model with 64 rows; the last four are padding whose logits would be the largest."""
    gpt = build_gpt_model(tiny.TEACHER, CONFIG)
    canonical_access.load(gpt, tiny.teacher_weights())
    gpt.vocabulary_shard = VocabularyShard(total=60, rows=64, first=0, ranks=1)
    with torch.no_grad():
        gpt.embedding.word_embeddings.weight[60:] = 1e4
    return gpt


def test_padding_is_in_no_loss_and_is_never_predicted(padded: torch.nn.Module) -> None:
    hidden = torch.randn(7, tiny.TEACHER.hidden_size, requires_grad=True)
    labels, mask = torch.arange(7), torch.ones(7)
    weight = lm_head_weight(padded)
    assert weight.shape == (60, tiny.TEACHER.hidden_size)
    loss = linear_distillation_loss(hidden, weight, labels, mask, first_label=0).loss
    loss.backward()
    table = padded.embedding.word_embeddings.weight
    logits = hidden.detach() @ table[:60].detach().t()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert table.grad is not None
    assert not table.grad[60:].any()
    assert table.grad[:60].any()
    likeliest = likeliest_tokens(hidden.detach(), weight, padded.vocabulary_shard.first)
    assert likeliest.tolist() == logits.argmax(1).tolist()


def test_a_model_is_stored_without_padding_and_loaded_with_zeros(padded: torch.nn.Module) -> None:
    name = "embedding.word_embeddings.weight"
    state = model_state([padded])
    (part,) = sharded_tensors(state["model0"][name])
    assert box_of(part).global_shape == (60, tiny.TEACHER.hidden_size)
    table = padded.embedding.word_embeddings.weight
    before = table.detach().clone()
    with torch.no_grad():
        table.copy_(state["model0"][name].merge_fn([part.data.clone()]))
    assert torch.equal(table[:60], before[:60])
    assert not table[60:].any()
