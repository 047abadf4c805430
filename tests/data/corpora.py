"""Small tokenizers, corpora and indexed data sets for the tests of this folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = tuple(
    """
    the of and a to in is you that it he was for on are as with his they at be this have from or
    one had by word but not what all were we when your can said there use an each which she do
    how their if will up other about out many then them these so some her would make like him
    """.split()  # noqa: SIM905
)


def text(rng: random.Random, words: int) -> str:
    """Random prose with numbers, line breaks and a few characters beyond ASCII."""
    parts = []
    for _ in range(words):
        kind = rng.random()
        if kind < 0.9:
            parts.append(rng.choice(_WORDS))
        elif kind < 0.95:
            parts.append(str(rng.randrange(10_000)))
        else:
            parts.append(rng.choice(["naïve", "“quoted”", "it's\n\n", "你好", "x = f(y);", "— 🙂"]))
    return " ".join(parts)


def write_jsonl(path: Path, documents: int, seed: int = 0, words: int = 60) -> Path:
    """A JSONL corpus of log-normal documents."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as stream:
        for number in range(documents):
            length = int(rng.lognormvariate(0, 0.8) * words) + 1
            row = {"text": text(rng, length), "id": number}
            stream.write(json.dumps(row, ensure_ascii=bool(number % 2)) + "\n")
    return path


def train_tokenizer(folder: Path, kind: str = "qwen", vocab_size: int = 500) -> str:
    """Train and save a byte-level BPE tokenizer in the way of GPT-2, Qwen or Llama (with BOS)."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(1)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text(rng, 200) for _ in range(30)), trainer)
    if kind == "llama":
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 3)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return str(folder)


def write_indexed(
    prefix: Path, documents: list[list[int]], dtype: Any = np.uint16
) -> tuple[str, list[list[int]]]:
    """Write documents with Megatron-Core's own builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix), documents


def numbered_documents(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are 1, 2, 3, … over the whole corpus."""
    edges = np.cumsum([0, *lengths]).tolist()
    return [list(range(a + 1, b + 1)) for a, b in zip(edges, edges[1:], strict=False)]
