"""Every task at 512K tokens: it uses the length, never exceeds it, and contains its answers."""

from __future__ import annotations

import json
import random
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_hydra.data.text import text_sentence
from megatron_hydra.evaluation.finding import load_task, task_names
from megatron_hydra.evaluation.tasks import SampleRequest

LENGTH = 512 * 1024
QA = "qa:questions.jsonl"


@pytest.fixture(scope="module")
def byte_pairs():
    """A tokenizer with a small model's vocabulary size, trained on the haystacks' sentences."""
    rng = random.Random(1)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text_sentence(rng) for _ in range(2000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def write_questions(path) -> None:
    rng = random.Random(2)
    rows = [
        {
            "question": f"Where is town {n}?",
            "answer": f"river {n}",
            "documents": [
                " ".join([f"Town {n} lies on river {n}.", *(text_sentence(rng) for _ in range(20))])
            ],
        }
        for n in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [*task_names(), QA])
def test_a_task_fills_half_a_million_tokens(name, byte_pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_questions(tmp_path / QA.removeprefix("qa:"))
    request = SampleRequest(
        length=LENGTH, count=1, depths=(0.5,), tokenizer=byte_pairs, lengths=(LENGTH,)
    )
    started = time.monotonic()
    (sample,) = load_task(name).samples(request)
    seconds = time.monotonic() - started
    used = len(byte_pairs(sample.prompt)["input_ids"]) + sample.max_new_tokens
    print(f"{name}: {used} tokens, {used / LENGTH:.4f} of the length, {seconds:.1f} s")
    assert 0.95 * LENGTH < used <= LENGTH
    assert all(str(answer) in sample.prompt for answer in sample.answers)
