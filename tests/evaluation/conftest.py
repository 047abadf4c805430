"""A byte tokenizer, a tiny model, and a fake model that reads its prompt: no download, no training."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
from megatron_hydra.hf.modeling_hydrahead import HydraHeadForCausalLM


@pytest.fixture(scope="session")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    config = HydraHeadConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        full_attention_heads=[[1], [2, 3]],
    )
    model = HydraHeadForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class Reader:
    """Answers needle questions by reading the prompt; for more than ``limit`` tokens it answers nothing."""

    def __init__(self, tokenizer, limit):
        self.tokenizer, self.limit = tokenizer, limit
        self.training, self.device, self.calls = False, torch.device("cpu"), 0
        self.config = SimpleNamespace(model_type="reader")
        self.generation_config = SimpleNamespace(eos_token_id=0)
        self.weight = torch.zeros(257, 1)

    def eval(self):
        return self

    def train(self, mode):
        self.training = mode

    def named_parameters(self):
        return [("embedding", self.weight)]

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.weight)

    def generate(self, input_ids, attention_mask, generation_config, stopping_criteria):
        self.calls += 1
        rows = []
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            prompt = self.tokenizer.decode(ids[mask])
            asked = re.search(r"magic \w+ for (\S+) mentioned", prompt).group(1)
            found = re.findall(rf"for {asked} is: (\S+)\.", prompt)
            said = " " + ", ".join(found) if len(ids[mask]) <= self.limit else " nothing"
            new = self.tokenizer(said)["input_ids"][: generation_config.max_new_tokens]
            rows.append(new + [0] * (generation_config.max_new_tokens - len(new)))
        return torch.cat((input_ids, torch.tensor(rows)), dim=1)


@pytest.fixture
def reader(tokenizer):
    return Reader(tokenizer, limit=1500)
