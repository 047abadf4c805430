"""The exported model labels sequences and tokens; tests load it from an export as a user does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.hf.models import KINDS, close, export, flattened, make_model, tokens

TASKS = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
}
LENGTHS = (1, 3, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("export")
    export(make_model(*KINDS["head"], tie_word_embeddings=True), path)
    return path


def load(folder, task, **options):
    torch.manual_seed(1)
    model = TASKS[task].from_pretrained(
        folder, trust_remote_code=True, num_labels=4, pad_token_id=0, **options
    )
    with torch.no_grad():  # a new head is nearly zero
        model.score.weight.normal_()
    return model.eval()


def padded(side):
    width = max(LENGTHS)
    ids, mask = torch.zeros(2, len(LENGTHS), width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        start = {"left": width - length, "right": 0}[side]
        ids[row, start : start + length] = tokens(1, length, seed=length)[0].clamp(min=1)
        mask[row, start : start + length] = 1
    return ids, mask


@pytest.mark.parametrize(
    "task, side, masked",
    [
        ("token", "left", True),
        ("token", "right", True),
        ("sequence", "left", True),
        ("sequence", "right", True),
        ("sequence", "right", False),  # the pad token marks the end of a text
    ],
)
def test_a_padded_batch_equals_single_sequences(folder, task, side, masked):
    model = load(folder, task)
    ids, mask = padded(side)
    with torch.no_grad():
        out = model(ids, attention_mask=mask if masked else None).logits
        for row in range(len(LENGTHS)):
            real = mask[row].bool()
            single = model(ids[row][real][None]).logits[0]
            close(out[row] if task == "sequence" else out[row][real], single)
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
    row = len(LENGTHS) - 1  # without padding
    head = model.score(hidden[row])
    close(out[row], head[-1] if task == "sequence" else head)


@pytest.mark.parametrize("task", TASKS)
def test_a_few_steps_of_training_then_saved_and_loaded(folder, task, tmp_path):
    """The loss falls, every weight of the decoder changes, and the saved model loads unchanged."""
    model = load(folder, task).train()
    ids, mask = padded("right")
    labels = ids % 4 if task == "token" else torch.tensor([0, 1, 2])
    if task == "token":
        labels = labels.masked_fill(mask == 0, -100)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    model.eval().save_pretrained(tmp_path / "tuned")
    loaded = TASKS[task].from_pretrained(tmp_path / "tuned", trust_remote_code=True).eval()
    with torch.no_grad():
        for side in ("left", "right"):
            ids, mask = padded(side)
            expected = model(ids, attention_mask=mask).logits
            assert torch.equal(loaded(ids, attention_mask=mask).logits, expected)


def test_scores_of_sequences_continue_from_a_cache(folder):
    model, ids = load(folder, "sequence"), tokens(1, 12)
    with torch.no_grad():
        begun = model(ids[:, :8], use_cache=True)
        out = model(ids[:, 8:], past_key_values=begun.past_key_values)
        close(out.logits, model(ids).logits)


def test_packed_documents_have_labels_of_their_own_tokens(folder):
    model = load(folder, "token")
    batch = flattened((5, 1, 7))
    batch["labels"] = batch["input_ids"] % 4
    with torch.no_grad():
        out = model(**batch)
        singles = [model(tokens(1, n, seed=n)).logits for n in (5, 1, 7)]
    close(out.logits, torch.cat(singles, dim=1))


def test_ambiguous_inputs_are_refused(folder):
    model = load(folder, "sequence")
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="give attention_mask, or set pad_token_id"):
        model(tokens(2, 5))
    with pytest.raises(TypeError, match=r"HydraHeadForSequenceClassification.*: seq_idx"):
        model(tokens(1, 5), seq_idx=torch.zeros(1, 5, dtype=torch.long))
    causal = make_model(*KINDS["head"])
    with pytest.raises(NotImplementedError, match=r"generate_batch.*padded batch"):
        causal.generate_batch([[1, 2, 3]], max_new_tokens=2)
