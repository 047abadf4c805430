"""Tiny random models in Hugging Face format, and inputs for them, shared by several tests."""

from __future__ import annotations

import json
import shutil

import torch

from megatron_hydra.config.model import DENSE_ATTENTION
from megatron_hydra.hf import modeling_hydrahead as modeling
from megatron_hydra.hf.configuration_hydrahead import SWITCHES, HydraHeadConfig
from megatron_hydra.hf.export_files import ARCHITECTURE, auto_map, hf_export_files

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
HEADS = [[1, 2, 3], [], [0, 1, 2, 3, 4, 5]]
MIXED = [[0, 5], [1, 2, 3], [4]]
ALL = [[0, 1, 2, 3, 4, 5]] * 3
DENSE = {k: v for k, v in vars(DENSE_ATTENTION).items() if k in SWITCHES}
KINDS = {
    "head": (HEADS, {}),
    "head-gqa": (MIXED, {"gdn_kv": "gqa"}),
    "head-shared": (MIXED, {"qkv": "shared"}),
    "head-kda": (MIXED, {"linear": "kda"}),
    "all-gdn": ([[]] * 3, {}),
    "dense": (ALL, DENSE),
    "parallel": (ALL, {"mixer": "parallel"}),
    "token": (ALL, {"mixer": "token", "window": 12}),
    "token-kda": (ALL, {"mixer": "token", "window": 12, "linear": "kda"}),
    "token-gqa": (ALL, {"mixer": "token", "window": 3, "gdn_kv": "gqa", "fa_position": "rope"}),
}


def rope(kind="default"):
    extra = {
        "default": {},
        "linear": {"factor": 4.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    }[kind]
    return {"rope_type": kind, "rope_theta": 5000.0, **extra}


def make_model(heads=MIXED, hydra=None, **changes):
    """:func:`random_model` of a small shape."""
    return random_model(
        HydraHeadConfig(
            **{**SHAPE, "rope_parameters": rope(), **changes},
            full_attention_heads=heads,
            hydra=hydra,
        )
    )


def random_model(config):
    """A model with non-trivial gates, norms, convolutions, and a decay so slow that leaks show."""
    torch.manual_seed(0)
    model = modeling.HydraHeadForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-5, -3)
            else:
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def tokens(batch, length, seed=1):
    return torch.randint(0, SHAPE["vocab_size"], (batch, length), generator=generator(seed))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def flattened(lengths, *, positions=True, bounds=False, numbers=False):
    """Inputs that transformers' collator makes from documents of these lengths."""
    from transformers import DataCollatorWithFlattening

    collate = DataCollatorWithFlattening(
        return_position_ids=positions, return_flash_attn_kwargs=bounds, return_seq_idx=numbers
    )
    return collate([{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in lengths])


def export(model, folder):
    """Write the files and the auto_map as the converter does."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": auto_map(), "architectures": [ARCHITECTURE]}
    (folder / "config.json").write_text(json.dumps(config))
    for name, path in hf_export_files().items():
        shutil.copyfile(path, folder / name)
