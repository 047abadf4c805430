"""Tiny random models and prompts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers

from megatron_hydra.selection.prompts import PromptPair

VOCABULARY = 50


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Fixed pairs as a capability."""

    name: str
    pairs: list[PromptPair]

    def prompts(self, tokenizer: Any, vocab_size: int, count: int, seed: int) -> list[PromptPair]:
        return self.pairs[:count]


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A random model: 3 layers, 6 query heads on 3 KV heads, weights large enough for sharp attention."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    }
    if family != "qwen2":
        shape["head_dim"] = 10
    shape |= overrides
    config = transformers.AutoConfig.for_model(family, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if parameter.dim() == 2 else 0.1
            start = 1.0 if "norm" in name else 0.0
            parameter.copy_(start + scale * torch.randn_like(parameter))
    return model.eval()


def random_pairs(lengths: list[int], first: int = 0, seed: int = 0) -> list[PromptPair]:
    """Random pairs that share their first ``first`` tokens and differ in about a third of the rest.

    Answers have one, two and three tokens in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for length in lengths:
        clean = torch.randint(VOCABULARY, (length,), generator=generator)
        other = torch.randint(VOCABULARY, (length,), generator=generator)
        change = torch.rand(length, generator=generator) < 0.3
        change[:first] = False
        change[first] = True
        other[first] = (clean[first] + 1) % VOCABULARY
        corrupted = torch.where(change, other, clean)
        span = 1 + len(pairs) % 3
        tokens = torch.randperm(VOCABULARY, generator=generator)[: 2 * span].tolist()
        answer, wrong = tuple(tokens[:span]), tuple(tokens[span:])
        pairs.append(PromptPair(tuple(clean.tolist()), tuple(corrupted.tolist()), answer, wrong))
    return pairs


def byte_tokenizer(texts: list[str] | None = None, merges: int = 0) -> Any:
    """A byte-level BPE: one token for each byte, and ``merges`` more learned from ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 1 + merges,
        initial_alphabet=alphabet,
        special_tokens=["<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts or [], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
